"""`cpt guard divergence`: how far an export is from the untouched model, on the traces of a run.

    <run_dir>/guard/traces + a Hugging Face directory -> divergence of each trace -> table

It tells what a harmless change costs in the unit of the tolerance: the MXFP4 rounding of an export,
say, or a model that was trained on the replay alone. A tolerance below that would be red for
nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpt.errors import ConfigError
from cpt.guard.score import Floats
from cpt.guard.traces.bounds import upper_bound
from cpt.guard.traces.divergence import Passes, measure_divergence
from cpt.guard.traces.store import TRACE_FOLDER, KeptTraces, TraceFolder
from cpt.guard.yardstick import GREEN_ERROR
from cpt.model.configuration import load_config
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.offline.model import OfflineModel
from cpt.offline.rank_options import RankOptions
from cpt.offline.ranks import offline_ranks

HARMLESS_FACTOR = 3
"""How many times what a harmless change costs the tolerance should be."""

CAP = 1.0
"""Nats a token that a trace counts with at most: twice the default hard limit."""


def divergence_report(run_dir: Path, model_dir: Path, options: RankOptions) -> str:
    """Measure an export on the traces of a run, on all ranks, and return a table for people.

    Args:
        run_dir: The run directory, whose traces are complete.
        model_dir: Hugging Face directory of the model, also in MXFP4.
        options: How the ranks work together.

    Raises:
        ConfigError: the run has no traces, or the directory holds no model of this architecture.
        DataError: the traces are damaged.
    """
    folder = TraceFolder(run_dir / "guard" / TRACE_FOLDER)
    kept = kept_domains(folder)
    config = load_config(model_dir, None, option="--model")
    weights = DirectoryWeights(model_dir, parameter_shapes(config))
    lines = [
        f"{model_dir} against the untouched model {next(iter(kept.values())).model}, nats a token",
        f"  {'domain':<24}  traces     text  at most  95 % of traces  control",
    ]
    with offline_ranks(config, folder.folder, options) as ranks:
        model = OfflineModel(config, ranks.topology)
        model.load(weights)
        for name, one in kept.items():
            ranks.clock.enter("evaluate", 0)
            longest = max(trace.num_slots for trace in one.traces)
            passes = Passes(topology=ranks.topology, micro_batch_size=1, seq_len=longest)
            found = measure_divergence(one.traces, folder.targets(one), model, passes)
            lines.append(_line(name, found.text, found.control))
    lines.append(
        f"If this model is a harmless variant, a tolerance of {HARMLESS_FACTOR} x the largest "
        "'at most' is not red for nothing."
    )
    return "\n".join(lines)


def kept_domains(folder: TraceFolder) -> dict[str, KeptTraces]:
    """Return the complete traces of a run by domain.

    Raises:
        ConfigError: there are none.
        DataError: a file is damaged.
    """
    kept = {}
    for path in sorted(folder.folder.glob("*.json")):
        name = path.name.removesuffix(".json")
        if ".sampled-" not in name:
            one = folder.read(name)
            assert one is not None
            kept[name] = one
    if not kept:
        raise ConfigError(
            f"{folder.folder} holds no complete traces. Give guard.traces to the mix of the run: "
            "they are sampled before step 0."
        )
    return kept


def _line(name: str, text: Floats, control: Floats) -> str:
    at_most = upper_bound(np.minimum(text, CAP), CAP, GREEN_ERROR)
    mean_control = f"{control.mean():7.4f}" if len(control) else f"{'-':>7}"
    return (
        f"  {name:<24}  {len(text):6d}  {text.mean():7.4f}  {at_most:7.4f}  "
        f"{np.quantile(text, 0.95):14.4f}  {mean_control}"
    )
