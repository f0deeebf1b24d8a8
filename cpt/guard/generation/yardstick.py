"""The yardstick of what the model does: it answers prompts, and its replies are measured.

    prompts (prompts.py) -> greedy replies, by all ranks -> measures (measures.py)
        -> judge (judge.py)

Files, all in <run_dir>/guard/generation and but for `answered` never written again:

    untouched-NAME.json      replies of the untouched model to the prompts of one domain
    answered-NAME.json       the same while it answers
    replies-STEP.json        replies of a look, from which its measures can be computed again
    examples-STEP.json       those that changed for the worse, for report.html
    measured-...             the same of a measurement apart from training

Decisions
    Replies are greedy, so those of the same weights are the same, and every difference from the
    untouched model is one of the weights.
    A prompt that the untouched model has answered is not asked again after a stop before step 0,
    but for those of the part in which it was stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt.config import RunConfig
from cpt.errors import ConfigError
from cpt.guard.baseline import keep_on_first_rank, write_on_first_rank
from cpt.guard.generation.examples import worst_changes
from cpt.guard.generation.judge import GenerationJudge
from cpt.guard.generation.measures import ReplyMeasures
from cpt.guard.generation.prompts import (
    PromptPool,
    look_of_step,
    looks_of_run,
    usable_prompts,
)
from cpt.guard.generation.table import generation_table
from cpt.guard.generation.untouched import (
    FOLDER,
    Untouched,
    answered_file,
    answered_so_far,
    columns_of,
    measures_of,
    missing_untouched,
    read_answered,
    read_stored,
    untouched_file,
)
from cpt.guard.untouched_model import untouched_name, untouched_weights
from cpt.guard.yardstick import Json, Kind, Look
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.resilience.phase import PhaseClock
from cpt.resilience.stop import StopRequest
from cpt.training.engine import TrainingEngine
from cpt.training.generate import MAX_ROWS, GenerationStopped, generate, reporting
from cpt.training.sampling import Sampling
from data_pipeline.config.generation_config import GenerationDomain, PromptRecord
from data_pipeline.config.mix_config import MixConfig

log = logging.getLogger("cpt.guard")

PART_OF_A_RANK = MAX_ROWS
"""Prompts of a rank between two saves of the untouched model's replies: as many as it can answer at
once, since what is being written is lost by a stop anyway.
"""
LEAST_PASSED = 0.5
"""Share of the untouched model's replies that should be in good form, and right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _DomainReplies:
    """Replies to the prompts of one domain at one look, measured."""

    indices: list[int]
    pass_number: int
    replies: Sequence[Sequence[int]]
    measures: list[ReplyMeasures]


class Generation(GenerationJudge):
    """The prompts of a run, and the replies of the untouched model to them."""

    kind: Kind = "generation"

    def __init__(
        self,
        mix: MixConfig,
        config: RunConfig,
        topology: Topology,
        run_dir: Path,
        clock: PhaseClock,
        *,
        observe: bool = False,
    ) -> None:
        """Read the prompts; nothing is generated yet.

        Args:
            mix: The data mix, its paths absolute.
            config: The run's configuration.
            topology: The layout.
            run_dir: The run directory.
            clock: Learns that this rank is at work, at every few tokens.
            observe: Whether another job may be at work in the run directory; what is measured then
                goes to files of other names.

        Raises:
            ConfigError: a line of a file cannot be used.
        """
        super().__init__({})
        self._clock = clock
        self._prefix = "measured-" if observe else ""
        self._config = config
        self._topology = topology
        self._folder = run_dir / "guard"
        self._interval = config.guard.generation_interval_steps
        self._pools: dict[str, PromptPool] = {}
        num_looks = looks_of_run(config.train.total_steps, self._interval)
        for domain in mix.guard.generation:
            self._pools[domain.name] = PromptPool.of(
                domain, self._read(domain), seed=config.train.seed, num_looks=num_looks
            )
        self.domain_names = list(self._pools)
        self._model = untouched_name(config)

    def _read(self, domain: GenerationDomain) -> list[PromptRecord]:
        """Return the prompts of a domain, as the first rank reads them.

        Raises:
            ConfigError: on all ranks: a line cannot be used.
        """
        found = on_first_rank(
            self._topology.control_group,
            lambda: [record.to_json() for record in usable_prompts(domain)],
        )
        return list(map(PromptRecord.from_json, found))

    def is_due(self, look: Look) -> bool:
        """Return whether it is time: before step 0, at the end, and at its own interval."""
        if look.step == 0 or look.last:
            return True
        return bool(self._interval) and look.step % self._interval == 0

    def measure(self, look: Look, engine: TrainingEngine, stop: StopRequest | None) -> Json | None:
        """Have the model answer the prompts of a look, and measure the replies.

        Returns:
            `look`, the number of the look; `replies` and `examples`, names of files; and `domains`,
            by name with the `prompts` asked (places in the pool), their `pass`, the measures `now`,
            and the limits. None if a stop was requested before everything was answered.

        Raises:
            ConfigError: see `cpt.guard.yardstick.Yardstick.measure`.
        """
        self.open_untouched(look.step)
        if not self.untouched and not self.keep_untouched(look, engine, stop):
            return None
        number = look_of_step(look.step, self._interval)
        step = look.step
        answered = {}
        for name in self.untouched:
            found = self._answer_look(name, number, step, engine, stop)
            if found is None:
                return None
            answered[name] = found
        return self._kept(look, number, answered)

    def table(self, events: Sequence[Json]) -> str:
        """Return the rates of all domains as a table for people."""
        return generation_table(events)

    def open_untouched(self, step: int) -> None:
        """Read the replies; see `cpt.guard.yardstick.Yardstick.open_untouched`."""
        if self.untouched or step == 0:
            return
        found = self._all_stored()
        if not found:
            raise missing_untouched(untouched_file(self._folder, self.domain_names[0]), step)
        left_out = [name for name in self._pools if name not in found]
        if left_out and self._topology.rank == 0:
            log.warning(
                "prompts %s are left out: the untouched model has not answered them.",
                ", ".join(left_out),
            )
        self.untouched = found

    def keep_untouched(self, look: Look, engine: TrainingEngine, stop: StopRequest | None) -> bool:
        """Generate the replies of the untouched model that are not there yet.

        See `cpt.guard.yardstick.Yardstick.keep_untouched`.
        """
        weights = self._base_weights()
        found = self._all_stored()
        for name, pool in self._pools.items():
            if name in found:
                continue
            answered = self._answer_pool(pool, weights, engine, stop)
            if answered is None:
                return False
            found[name] = answered
        self.untouched = found
        return True

    def _base_weights(self) -> str:
        return untouched_weights(self._config, self._topology)

    def _all_stored(self) -> dict[str, Untouched]:
        """Return the stored replies of the untouched model by domain; see `_stored`."""
        weights = self._base_weights()
        found = {}
        for name, pool in list(self._pools.items()):
            stored = self._stored(pool, weights)
            if stored is not None:
                found[name] = stored
        return found

    def _stored(self, pool: PromptPool, weights: str) -> Untouched | None:
        """Return the stored replies of the untouched model; None if there are none.

        Raises:
            ConfigError: they are replies to other prompts, or of another model.
        """
        path = untouched_file(self._folder, pool.domain.name)
        content = on_first_rank(self._topology.control_group, lambda: read_stored(path))
        if content is None:
            return None
        stored = Untouched.from_json(content)
        # the planned looks may be others now, but only these prompts were answered
        pool = pool.of_size(len(stored.prompts))
        problems = stored.check(path, pool, self._model, weights)
        if problems:
            raise ConfigError(problems)
        self._pools[pool.domain.name] = pool
        return stored

    def _answer_pool(
        self, pool: PromptPool, weights: str, engine: TrainingEngine, stop: StopRequest | None
    ) -> Untouched | None:
        """Have the untouched model answer all prompts of a domain, and keep its replies.

        Returns:
            None if a stop was requested; what was answered before is kept.
        """
        group = self._topology.control_group
        answered = answered_file(self._folder, pool.domain.name)
        replies = on_first_rank(group, lambda: read_answered(answered, pool, weights))
        part = PART_OF_A_RANK * self._topology.world_size
        for first in range(len(replies), len(pool.records), part):
            indices = range(first, min(first + part, len(pool.records)))
            more = self._replies(pool, indices, 0, engine, stop)
            if more is None:
                return None
            replies += more
            write_on_first_rank(group, answered, answered_so_far(pool, replies, weights))
        content = on_first_rank(
            group,
            lambda: Untouched.of(pool, replies, model=self._model, weights=weights).to_json(),
        )
        write_on_first_rank(group, untouched_file(self._folder, pool.domain.name), content)
        on_first_rank(group, lambda: answered.unlink(missing_ok=True))
        untouched = Untouched.from_json(content)
        self._warn_of_little_to_lose(pool, untouched)
        return untouched

    def _warn_of_little_to_lose(self, pool: PromptPool, untouched: Untouched) -> None:
        """Say so if the untouched model has so little of a quantity that no loss could show."""
        for measure in ("format", "accuracy"):
            values = [one.value(measure) for one in untouched.measures]
            known = [value for value in values if value is not None]
            if not known or sum(known) >= LEAST_PASSED * len(known) or self._topology.rank:
                continue
            log.warning(
                "prompts %s: the untouched model passes %s in %d of %d replies. What it does not "
                "have it cannot lose. Look at its replies in %s; a larger max_new_tokens (%d) or "
                "other prompts may help.",
                pool.domain.name,
                measure,
                sum(known),
                len(known),
                untouched_file(self._folder, pool.domain.name),
                pool.domain.max_new_tokens,
            )

    def _answer_look(
        self, name: str, number: int, step: int, engine: TrainingEngine, stop: StopRequest | None
    ) -> _DomainReplies | None:
        """Answer the prompts of a look; those of look 0 the untouched model has answered, unless
        the run starts from another model.
        """
        pool = self._pools[name]
        untouched = self.untouched[name]
        asked = pool.of_look(number)
        if number == 0 and self._config.guard.baseline_model is None:
            return _DomainReplies(
                indices=asked.indices,
                pass_number=asked.pass_number,
                replies=[untouched.replies[index] for index in asked.indices],
                measures=[untouched.measures[index] for index in asked.indices],
            )
        replies = self._replies(pool, asked.indices, step, engine, stop)
        if replies is None:
            return None
        # language identification computes with floats: one rank decides for all
        columns = on_first_rank(
            self._topology.control_group,
            lambda: columns_of(untouched.measure(asked.indices, replies)),
        )
        return _DomainReplies(
            indices=asked.indices,
            pass_number=asked.pass_number,
            replies=replies,
            measures=measures_of(columns),
        )

    def _replies(
        self,
        pool: PromptPool,
        indices: Sequence[int],
        step: int,
        engine: TrainingEngine,
        stop: StopRequest | None,
    ) -> list[list[int]] | None:
        """Return the greedy replies to some prompts; None if a stop was requested."""
        prompts = [pool.encode(index) for index in indices]
        sampling = Sampling(max_new_tokens=pool.domain.max_new_tokens)

        def beat() -> None:
            self._clock.enter("evaluate", step)

        name = f"replies {pool.domain.name}"
        try:
            with reporting(self._topology, len(prompts), name, beat) as report:
                return generate(engine, prompts, sampling, stop=stop, report=report)
        except GenerationStopped:
            return None

    def _kept(self, look: Look, number: int, answered: dict[str, _DomainReplies]) -> Json:
        """Write replies and examples of a look, and return its scores."""
        scores: Json = {"look": number, "replies": "", "examples": "", "domains": {}}
        replies: Json = {"step": look.step, "domains": {}}
        examples: Json = {"step": look.step, "domains": {}}
        for name, found in answered.items():
            domain = self._pools[name].domain
            scores["domains"][name] = {
                "prompts": found.indices,
                "pass": found.pass_number,
                "now": columns_of(found.measures),
                "tolerances": {
                    "format": domain.format_tolerance_points,
                    "accuracy": domain.accuracy_tolerance_points,
                },
                "hard_limit": domain.hard_limit_points,
            }
            replies["domains"][name] = {"prompts": found.indices, "replies": found.replies}
            examples["domains"][name] = worst_changes(
                self.untouched[name], found.indices, found.replies, found.measures
            )
        if number:
            scores["replies"] = self._keep("replies", look.step, replies)
            scores["examples"] = self._keep("examples", look.step, examples)
        return scores

    def _keep(self, what: str, step: int, content: Json) -> str:
        """Keep a file of a look and return its name; see `keep_on_first_rank`."""
        group = self._topology.control_group
        return keep_on_first_rank(
            group, self._folder / FOLDER, f"{self._prefix}{what}", step, content
        )
