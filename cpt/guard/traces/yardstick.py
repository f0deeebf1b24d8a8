"""The yardstick of own traces: the untouched model's replies, and the divergence on them.

    before step 0   the untouched model samples its replies, and keeps them with its likeliest next
                    tokens (sampling.py)
    at every look   one forward pass over them -> divergence of each trace -> judge (judge.py)

Decisions
    A domain that was added after step 0 is left out, as the untouched model is gone. A run without
    any traces at a later step is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from cpt.config import RunConfig
from cpt.guard.traces.divergence import Passes, measure_divergence
from cpt.guard.traces.judge import TraceJudge, divergence_table, scores_of
from cpt.guard.traces.sampling import (
    TOP_K,
    AskedPrompts,
    BaseModel,
    asked_prompts,
    freeze_traces,
    kept_traces,
)
from cpt.guard.traces.store import (
    TRACE_FOLDER,
    KeptTraces,
    Tokens,
    TraceFolder,
    check_origin,
    missing_traces,
)
from cpt.guard.untouched_model import untouched_name, untouched_weights
from cpt.guard.yardstick import Json, Kind, Look
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.resilience.agreed_stop import agreed_reason
from cpt.resilience.phase import PhaseClock
from cpt.resilience.stop import StopRequest
from cpt.training.engine import TrainingEngine
from cpt.training.generate import GenerationStopped, generate, reporting
from cpt.training.sampling import Sampling
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.traces_config import TraceDomain

log = logging.getLogger("cpt.guard")


class OwnTraces(TraceJudge):
    """The traces of a run."""

    kind: Kind = "traces"

    def __init__(
        self,
        mix: MixConfig,
        config: RunConfig,
        topology: Topology,
        run_dir: Path,
        clock: PhaseClock,
    ) -> None:
        """Take the domains of the mix; nothing is read or sampled yet.

        Args:
            mix: The data mix, its paths absolute.
            config: The configuration of the run.
            topology: The layout.
            run_dir: The run directory.
            clock: Learns that this rank is at work.
        """
        self._domains = {domain.name: domain for domain in mix.guard.traces}
        self.domain_names = list(self._domains)
        self._config = config
        self._topology = topology
        self._clock = clock
        self._folder = TraceFolder(run_dir / "guard" / TRACE_FOLDER)
        self._passes = Passes(
            topology=topology,
            micro_batch_size=config.micro_batch_size,
            seq_len=config.measured_seq_len,
        )
        self._kept: dict[str, KeptTraces] = {}

    def is_due(self, look: Look) -> bool:
        """Return that traces are measured at every look."""
        return True

    def measure(self, look: Look, engine: TrainingEngine, stop: StopRequest | None) -> Json | None:
        """Measure the divergence on all traces; before step 0 they are sampled first.

        Returns:
            By domain, the output of `scores_of`; None if a stop was requested before everything
            was measured.

        Raises:
            ConfigError: the traces are those of another model or of other prompts, or there are
                none at a later step.
            DataError: they are damaged.
        """
        self.open_untouched(look.step)
        if not self._kept and not self.keep_untouched(look, engine, stop):
            return None
        scores: Json = {}
        for name, kept in self._kept.items():
            if scores and stop is not None and agreed_reason(stop, self._topology.control_group):
                return None
            self._clock.enter("evaluate", look.step)
            targets = self._folder.targets(kept)
            found = measure_divergence(kept.traces, targets, engine, self._passes)
            scores[name] = scores_of(self._domains[name], found.text, found.control)
        return scores

    def table(self, events: Sequence[Json]) -> str:
        """Return the divergences of all domains as a table for people."""
        return divergence_table(events)

    def open_untouched(self, step: int) -> None:
        """Read the traces; see `cpt.guard.yardstick.Yardstick.open_untouched`."""
        if self._kept or step == 0:
            return
        weights = untouched_weights(self._config, self._topology)
        found: dict[str, KeptTraces] = {}
        for name, domain in self._domains.items():
            kept = self._read(self._asked(domain), weights)
            if kept is not None:
                found[name] = kept
        self._refuse_none(found, step)
        self._kept = found

    def keep_untouched(self, look: Look, engine: TrainingEngine, stop: StopRequest | None) -> bool:
        """Read the traces of all domains, and sample those that are not there yet.

        See `cpt.guard.yardstick.Yardstick.keep_untouched`.
        """
        weights = untouched_weights(self._config, self._topology)
        found: dict[str, KeptTraces] = {}
        for name, domain in self._domains.items():
            asked = self._asked(domain)
            kept = self._read(asked, weights)
            if kept is None:
                if not self._sample(asked, weights, engine, stop):
                    return False
                kept = self._read(asked, weights)
            assert kept is not None
            found[name] = kept
        self._kept = found
        return True

    def _asked(self, domain: TraceDomain) -> AskedPrompts:
        """Return the prompts of a domain, as the first rank reads them."""
        prompts = on_first_rank(
            self._topology.control_group, lambda: list(asked_prompts(domain).prompts)
        )
        return AskedPrompts(domain=domain, prompts=prompts)

    def _read(self, asked: AskedPrompts, weights: str) -> KeptTraces | None:
        """Return the traces that the run keeps; None if they are not complete.

        Raises:
            ConfigError: they are of another model or of other prompts.
        """
        name = asked.domain.name
        kept = kept_traces(self._folder, name, self._topology.control_group)
        if kept is not None:
            check_origin(self._folder.traces_file(name), kept.origin, asked.origin(weights))
        return kept

    def _sample(
        self, asked: AskedPrompts, weights: str, engine: TrainingEngine, stop: StopRequest | None
    ) -> bool:
        """Sample the traces of a domain; return False if a stop was requested meanwhile."""
        name = asked.domain.name

        def beat() -> None:
            self._clock.enter("sample", 0)

        def sample(
            prompts: Sequence[Tokens], sampling: Sampling, numbers: Sequence[int]
        ) -> list[Tokens]:
            with reporting(self._topology, len(prompts), f"traces {name}", beat) as report:
                return generate(
                    engine, prompts, sampling, numbers=numbers, stop=stop, report=report
                )

        config = self._config
        base = BaseModel(
            model=engine,
            name=untouched_name(config),
            weights=weights,
            top_k=min(TOP_K, engine.model_config.vocab_size - 1),
        )
        try:
            freeze_traces(asked, base, sample, self._folder, self._passes)
        except GenerationStopped:
            return False
        return True

    def _refuse_none(self, found: dict[str, KeptTraces], step: int) -> None:
        """Refuse a run without traces, and tell of domains that are left out.

        Raises:
            ConfigError: no domain has traces.
        """
        missing = [name for name in self._domains if name not in found]
        if missing and not found:
            raise missing_traces(self._folder.traces_file(missing[0]), step)
        if missing and self._topology.rank == 0:
            log.warning(
                "traces %s are left out: the untouched model did not write them.",
                ", ".join(missing),
            )
