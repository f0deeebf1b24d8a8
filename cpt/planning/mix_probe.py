"""Probe runs: what short runs with different shares of replay leave behind.

metrics.jsonl               tokens by source -> the share of replay
guard/baseline.json         nats of every document under the untouched model
guard/scores-*.json         nats of the same documents at the end
config.resolved.yaml        what probes must have in common (mix_probe_check.py)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cpt.errors import ConfigError
from cpt.guard.baseline import BASELINE_FILE, read_baseline, stored_baselines
from cpt.guard.paired_test import cluster_sums
from cpt.guard.score import as_floats
from cpt.telemetry.event_reader import iter_events
from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.bounded.yaml_text import read_yaml
from data_pipeline.config.mix_file import load_mix

Floats = npt.NDArray[np.float64]
Json = dict[str, Any]

HARMLESS_ACTIONS = {"none", "warn"}
"""Actions of the guard that leave the run as it was planned."""
FREE_SETTINGS = {
    "total_steps",
    "stop_at_step",
    "warmup_steps",
    "decay_steps",
    "decay_phase",
    "seed",
    "micro_batch_size",
    "threads",
    "gc_interval_steps",
    "max_rollbacks",
    "accept_schedule_change",
    "kl_targets",
}
"""Keys of the `train` section in which probes may differ; the lengths are looked at apart."""
TRAINED_WITH = ("router_aux_loss_coef", "router_z_loss_coef")
"""Keys of the `model` section that change what is trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProbeScores:
    """The scores of one domain before and after a probe run."""

    before: Floats
    """(documents,) nats of each document under the untouched model; documents of one cluster, which
    change together, count as one.
    """
    after: Floats
    """(documents,) nats at the end of the run."""
    content: tuple[str, str]
    """Hashes of the documents and of the untouched weights."""

    @property
    def change_percent(self) -> float:
        """Change of the bits per byte in percent; positive is worse."""
        return float(100 * (self.after.sum() / self.before.sum() - 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A short run at one share of replay."""

    name: str
    """Its run directory."""
    replay_share: float
    """Predicted tokens that are not in the main language, 0 to 1."""
    main_language: str
    """The language that the run is for."""
    replay_parts: Mapping[str, float]
    """Share of each source in the replay."""
    steps: int
    """Optimizer steps."""
    recipe: Mapping[str, Any]
    """Settings that all probes must share."""
    scores: Mapping[str, ProbeScores]
    """Scores by domain, of the domains outside the main language."""
    gain_percent: float
    """Mean fall of bits per byte over the domains of the main language; NaN if there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _FinishedRun:
    """What a run left, before it is known which language is the main one."""

    folder: Path
    config: Json
    """Content of config.resolved.yaml."""
    tokens: dict[str, float]
    """Predicted tokens by source."""
    languages: dict[str, str]
    """Language of each source."""
    scores_name: str
    """File of its last scores."""

    def language_shares(self) -> dict[str, float]:
        """Return the share of each language in the predicted tokens."""
        shares: dict[str, float] = defaultdict(float)
        for source, count in self.tokens.items():
            shares[self.languages[source]] += count / sum(self.tokens.values())
        return dict(shares)


def read_probes(run_dirs: Sequence[Path]) -> list[Probe]:
    """Read what finished probe runs have found.

    The main language is the one with the largest share in any of them, since in a probe with much
    replay it is not the largest.

    Raises:
        ConfigError: a run is not done, its guard interfered, or its files cannot be read.
    """
    runs = [_read_run(run_dir) for run_dir in run_dirs]
    largest: dict[str, float] = defaultdict(float)
    for run in runs:
        for language, share in run.language_shares().items():
            largest[language] = max(largest[language], share)
    main = max(largest, key=largest.__getitem__)
    return [_probe_of(run, main) for run in runs]


def _read_run(run_dir: Path) -> _FinishedRun:
    try:
        decisions, tokens_of_steps = _read_log(run_dir / "metrics.jsonl")
        config = read_yaml(run_dir / "config.resolved.yaml", follow_links=False)
        total_steps = config["train"]["total_steps"]
    except OSError as error:
        raise ConfigError(
            f"probe {run_dir}: {error.strerror}: {error.filename}. Is it a run directory?"
        ) from error
    except (MalformedInput, KeyError, TypeError) as error:
        raise ConfigError(
            f"probe {run_dir}: config.resolved.yaml is not that of a run ({error})."
        ) from error
    if total_steps not in decisions:
        raise ConfigError(
            f"probe {run_dir}: the guard has not measured step {total_steps}, the last of the "
            "schedule. Let the run finish."
        )
    _check_no_action(run_dir, decisions)
    tokens = _summed(tokens_of_steps.values())
    return _FinishedRun(
        folder=run_dir,
        config=config,
        tokens=tokens,
        languages=_languages(run_dir, config, tokens),
        scores_name=decisions[total_steps]["scores"],
    )


def _probe_of(run: _FinishedRun, main_language: str) -> Probe:
    main_share = run.language_shares().get(main_language, 0.0)
    num_tokens = sum(run.tokens.values())
    replay_parts = {}
    for source, count in run.tokens.items():
        if run.languages[source] != main_language and main_share < 1:
            replay_parts[source] = count / num_tokens / (1 - main_share)
    scores, gains = _read_scores(run.folder, run.scores_name, main_language)
    return Probe(
        name=run.folder.name,
        replay_share=1 - main_share,
        main_language=main_language,
        replay_parts=replay_parts,
        steps=run.config["train"]["total_steps"],
        recipe=_recipe(run.config),
        scores=scores,
        gain_percent=float(np.mean(gains)) if gains else math.nan,
    )


def _read_log(metrics: Path) -> tuple[dict[int, Json], dict[int, Json]]:
    """Return the guard's decisions, and the tokens by source, by step; its last line counts."""
    decisions = {}
    tokens = {}
    for event in iter_events(metrics, ("guard_decision", "step")):
        if event["event"] == "step":
            tokens[event["step"]] = event["tokens_by_source"]
        else:
            decisions[event["step"]] = event
    return decisions, tokens


def _check_no_action(run_dir: Path, decisions: Mapping[int, Json]) -> None:
    """Refuse a run in which the guard changed the mix or the learning rate."""
    for step, decision in decisions.items():
        if decision["action"] not in HARMLESS_ACTIONS:
            raise ConfigError(
                f"probe {run_dir}: the guard acted at step {step} ({decision['action']}), so the "
                "run has no share of its own. Run probes with guard.policy: warn."
            )


def _summed(tokens_of_steps: Iterable[Json]) -> dict[str, float]:
    """Return the predicted tokens of a run by source."""
    tokens: dict[str, float] = defaultdict(float)
    for counts in tokens_of_steps:
        for source, count in counts.items():
            tokens[source] += count
    return dict(tokens)


def _languages(run_dir: Path, config: Json, tokens: Mapping[str, float]) -> dict[str, str]:
    """Return the language of each source that was trained on."""
    path = config["data"]["mix"]
    languages = {}
    for source in load_mix(path, need_files=False).sources:
        languages[source.name] = source.language
    unknown = sorted(set(tokens) - set(languages))
    if unknown:
        raise ConfigError(
            f"probe {run_dir}: {path} no longer lists the sources {', '.join(unknown)}. Restore "
            "the mix that the run was started with."
        )
    return languages


def _recipe(config: Json) -> Json:
    """Return the settings that all probes must share, by key."""
    train = config["train"]
    recipe = {}
    for key, value in train.items():
        if key not in FREE_SETTINGS:
            recipe[f"train.{key}"] = value
    for key in TRAINED_WITH:
        recipe[f"model.{key}"] = config["model"].get(key, 0.0)
    recipe |= _adapter_settings(config.get("adapter", {}))
    # a warm-up and a decay may be longer in a longer run
    for key in ("warmup_steps", "decay_steps"):
        share = train.get(key, 0) / max(1, train["total_steps"])
        recipe[f"train.{key} / total_steps"] = round(share, 3)
    return recipe


def _adapter_settings(adapter: Json) -> Json:
    """Return what a run trains beside the model; its other keys say nothing without an adapter."""
    kind = adapter.get("kind", "none")
    if kind == "none":
        return {"adapter.kind": kind}
    return {f"adapter.{key}": value for key, value in adapter.items()}


def _read_scores(
    run_dir: Path, name: str, main_language: str
) -> tuple[dict[str, ProbeScores], list[float]]:
    """Return scores by domain outside the main language, and the gains of those in it."""
    path = run_dir / "guard" / BASELINE_FILE
    stored = read_baseline(path)
    known = stored_baselines(stored)
    scores = {}
    gains = []
    for domain, nats in _last_nats(run_dir, name).items():
        if domain not in known:
            raise ConfigError(f"probe {run_dir}: {path} does not hold {domain}. Restore the file.")
        before = known[domain]
        score = ProbeScores(
            before=cluster_sums(before.panel.nats, before.clusters),
            after=cluster_sums(nats, before.clusters),
            content=(stored[domain]["content_hash"], stored[domain]["weights"]),
        )
        if before.panel.language == main_language:
            gains.append(-score.change_percent)
        else:
            scores[domain] = score
    return scores, gains


def _last_nats(run_dir: Path, name: str) -> dict[str, Floats]:
    """Return the nats of every document at the end of a run, by domain."""
    path = run_dir / "guard" / name
    try:
        stored = read_json(path, LARGE_BYTES)
    except OSError as error:
        raise ConfigError(
            f"probe {run_dir}: {error.strerror}: {path}. A curve needs the scores of every "
            "document; keep the guard folder of a probe."
        ) from error
    # before 0.2 held-out text was the only yardstick
    text = stored.get("yardsticks", {"text": stored})["text"]
    by_domain = {}
    for domain, plain in text["nats"].items():
        by_domain[domain] = as_floats(plain)
        if not np.isfinite(by_domain[domain]).all():
            raise ConfigError(
                f"probe {run_dir}: {path} holds scores of {domain} that are not finite, so its "
                "loss is not known. Repeat the probe."
            )
    return by_domain
