"""One cell of the proof again, through cpt/run.py and cpt export, beside the same in one process.

The rows, the schedule and the seeds are the same, so the figures must agree up to the order of
sums in fp32, and the bf16 in which an export has what is not rounded to MXFP4.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from guard_parts import launching
from safetensors.torch import save_file

from cpt.config.precision_sections import ExponentRule
from cpt.telemetry.metrics import read_events
from data_pipeline.store.files import write_json
from mxfp4_parts.cells import finetuning
from mxfp4_parts.outcome import rate_text
from mxfp4_parts.scale import Scale
from mxfp4_parts.texts import DOMAINS, JAPANESE, write_mix
from mxfp4_parts.training import Weights, model_config

RESULT_FILE = "product.json"
"""The comparison, in the folder of the proof."""
SCALE_FILE = "scale.json"
"""The sizes of a release, beside its weights."""
AWARE_RULE: ExponentRule = "floor"
"""The rule of the MXFP4-aware run."""


def write_release(folder: Path, scale: Scale, weights: Weights) -> Path:
    """Write a release as a Hugging Face directory in fp32, and return it.

    A write that was killed leaves nothing of that name.

    Raises:
        ValueError: the folder holds the release of another scale.
    """
    out = folder / "release"
    if out.exists():
        file = out / SCALE_FILE
        _refuse_other_scale(out, json.loads(file.read_text()) if file.exists() else {}, scale)
        return out
    unfinished = folder / "release.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    config = model_config(scale)
    config.architectures = ["GptOssForCausalLM"]
    config.dtype = torch.float32
    config.save_pretrained(unfinished)
    save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
    write_json(unfinished / SCALE_FILE, scale_json(scale), indent=1)
    unfinished.rename(out)
    return out


def finished(folder: Path, scale: Scale) -> dict[str, Any] | None:
    """Return the comparison of an earlier start; None if there is none.

    Raises:
        ValueError: it is of another scale.
    """
    path = folder / RESULT_FILE
    if not path.exists():
        return None
    comparison: dict[str, Any] = json.loads(path.read_text())
    _refuse_other_scale(path, comparison.get("scale", {}), scale)
    return comparison


def scale_json(scale: Scale) -> dict[str, Any]:
    """Return a scale as its JSON reads."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(scale)))
    return plain


def _refuse_other_scale(path: Path, recorded: dict[str, Any], scale: Scale) -> None:
    now = scale_json(scale)
    changed = [key for key in now if recorded.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"{path} was made with another scale ({', '.join(changed)} differ). Give another "
            "--work_dir, or remove it."
        )


def run_product(
    folder: Path, scale: Scale, cell: dict[str, Any], release: Weights
) -> dict[str, Any]:
    """Run a cell through the product's commands, compare the figures, and write them.

    Args:
        folder: Folder of the proof.
        scale: Sizes.
        cell: The result of the same cell in one process.
        release: The weights that it began with.

    Returns:
        The scale, and by name of a figure that of the one process, that of the product, and their
        difference.
    """
    out = folder / "product"
    out.mkdir(exist_ok=True)
    base = write_release(out, scale, release)
    plain = launching.train(out / "plain", _run_yaml(folder, scale, cell, base))
    quantize = {"experts": "mxfp4", "start_step": scale.aware_from, "exponent": AWARE_RULE}
    aware_yaml = _run_yaml(folder, scale, cell, base)
    aware_yaml["train"]["quantize"] = quantize
    aware = launching.train(out / "aware", aware_yaml)
    rules = _score_rules(plain, base, out / "export")
    figures = compared(cell, _scores(plain, 0), _scores(plain, -1), _scores(aware, -1), rules)
    comparison = {**figures, "scale": scale_json(scale)}
    write_json(folder / RESULT_FILE, comparison, indent=1)
    return comparison


def _run_yaml(folder: Path, scale: Scale, cell: dict[str, Any], base: Path) -> dict[str, Any]:
    section = finetuning(scale, cell["lr"])
    mix = write_mix(folder, scale, cell["seed"], JAPANESE)
    train = {
        "total_steps": section.total_steps,
        "seq_len": scale.seq_len,
        "global_batch_size": scale.global_batch_size,
        "micro_batch_size": scale.global_batch_size,
        "lr": section.lr,
        "schedule": section.schedule,
        "warmup_steps": section.warmup_steps,
        "dtype": "fp32",
        "threads": 1,
    }
    return {
        "model": {"path": str(base)},
        "data": {"mix": str(mix), "build_dir": str(folder / "build")},
        "train": train,
        "guard": {"policy": "warn"},
    }


def _scores(run_dir: Path, place: int) -> dict[str, float]:
    """Return a measurement of the guard by domain: the first or the last of a run."""
    found = {}
    for domain in DOMAINS:
        values = []
        for event in read_events(run_dir / "metrics.jsonl"):
            if event["event"] == "guard" and event["domain"] == domain:
                values.append(float(event["bits_per_byte"]))
        found[domain] = values[place]
    return found


def _score_rules(run_dir: Path, base: Path, out: Path) -> dict[str, Any]:
    """Export a run with `--score_rules` unless that is done, and return what it says."""
    file = out / "mxfp4_rules.json"
    if not file.exists():
        arguments = ["export", "--run_dir", str(run_dir), "--base", str(base), "--out", str(out)]
        arguments += ["--format", "mxfp4", "--score_rules", "--exponent", AWARE_RULE]
        launching.run_script("command.py", arguments, out.with_suffix(".log"))
    rules: dict[str, Any] = json.loads(file.read_text())
    return rules


def compared(
    cell: dict[str, Any],
    first: dict[str, float],
    trained: dict[str, float],
    aware: dict[str, float],
    rules: dict[str, Any],
) -> dict[str, Any]:
    """Return every figure of a cell as one process has it, as the product has it, and how near.

    Args:
        cell: The result of one process.
        first: The guard's measurement of the release, by domain.
        trained: Its measurement after the plain run.
        aware: Its measurement after the MXFP4-aware run, of the weights that would be served.
        rules: What `cpt export --score_rules` says of the plain run.
    """
    pairs: dict[str, tuple[float, float]] = {}
    for domain in DOMAINS:
        pairs[f"released, {domain}"] = (cell["released"][domain], first[domain])
        pairs[f"trained, {domain}"] = (cell["trained"][domain], trained[domain])
        own = cell["aware"][AWARE_RULE]["held_out"][domain]
        pairs[f"aware {AWARE_RULE}, {domain}"] = (own, aware[domain])
    for rule, found in rules["rules"].items():
        own = cell["plain"][rule]
        pairs[f"kept, {rule}"] = (own["kept"], found["all_expert_matrices"]["kept"])
        for one in found["held_out"]:
            domain = one["domain"]
            exported = (own["held_out"][domain], one["bits_per_byte_exported"])
            pairs[f"exported {rule}, {domain}"] = exported
            without = (cell["base_experts"][domain], one["bits_per_byte_base_experts"])
            pairs[f"base experts, {domain}"] = without
    figures = {}
    for name, (own, product) in pairs.items():
        figures[name] = {"one_process": own, "product": product, "difference": product - own}
    return {"cell": {key: cell[key] for key in ("arm", "seed", "lr")}, "figures": figures}


def told(comparison: dict[str, Any]) -> str:
    """Return how near the product is to one process, in words, on two lines."""
    cell = comparison["cell"]
    where = f"{cell['arm']}, seed {cell['seed']}, lr {rate_text(cell['lr'])}"
    parts = []
    for name in ("released", "trained", "aware", "base experts", "exported"):
        parts.append(f"{name} {_largest(comparison, name):.0e}")
    return (
        f"One cell ({where}) through cpt/run.py and cpt export --score_rules differs by at most,\n"
        f"in bits per byte: {', '.join(parts)} (in bf16 outside the experts); in kept by "
        f"{_largest(comparison, 'kept'):.0e}."
    )


def _largest(comparison: dict[str, Any], prefix: str) -> float:
    """Return the largest difference of the figures whose names begin so."""
    found = []
    for name, values in comparison["figures"].items():
        if name.startswith(prefix):
            found.append(abs(values["difference"]))
    return max(found)
