"""The guard of one run: baseline frozen before step 0, measurements paired against it.

The baseline lives in <run_dir>/guard/baseline.json with a hash of the text it was measured on.  It is written
once and never again: resuming a run reads it.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cpt.config import RunConfig
from cpt.errors import ConfigError
from cpt.faults import fault_point
from cpt.guard.policy import Judgement, judge
from cpt.guard.score import DomainScore, ScoredSet, score_domain
from cpt.parallel.agreement import on_first_rank
from cpt.parallel.topology import Topology
from cpt.state.leaving import agreed_reason
from cpt.state.stop import StopRequest
from cpt.telemetry.metrics import Telemetry
from cpt.training.engine import TrainingEngine
from data_pipeline.dataset import BuiltData

log = logging.getLogger("cpt.guard")


class Guard:
    """Held-out domains and the scores of the untouched model on them."""

    def __init__(self, data: BuiltData, config: RunConfig, topology: Topology, run_dir: Path) -> None:
        self._config, self._topology = config, topology
        empty = [domain.name for domain in data.held_out if not domain.num_rows]
        if empty:
            raise ConfigError(
                f"guard domain {', '.join(empty)} holds no document. Raise held_out_share of its sources, or take the "
                "domain out of the mix."
            )
        self._domains = [ScoredSet(domain, config.guard.max_documents) for domain in data.held_out]
        self._model = str(config.model.path or f"{config.model.init}, seed {config.train.seed}")
        self._file = run_dir / "guard" / "baseline.json"
        self._baseline: dict[str, DomainScore] = {}
        self.latest: dict[str, Judgement] = {}
        """The last measurement of each domain."""

    def measure(self, step: int, engine: TrainingEngine, telemetry: Telemetry, stop: StopRequest | None = None) -> bool:
        """Score all domains, freeze or compare, and log one guard event per domain; all ranks call it together.

        Args:
            step: Optimizer steps done.
            engine: Scores.
            telemetry: Where the events go.
            stop: Looked at after each domain; a measurement is not worth a missed deadline.

        Returns:
            Whether it was finished.
        """
        self._topology.place.enter("evaluate", step)
        fault_point("evaluate", step)
        if not self._baseline:
            self._baseline = self._stored_baseline()
        scores: dict[str, DomainScore] = {}
        for domain in self._domains:
            if scores and stop is not None and agreed_reason(stop, self._topology.control_group):
                return False
            if step == 0 or domain.name in self._baseline:
                scores[domain.name] = score_domain(
                    domain, engine, self._topology, micro_batch_size=self._config.micro_batch_size
                )
        if not self._baseline:
            self._baseline = self._freeze(scores, step)
        for name, score in scores.items():
            verdict = judge(score, self._baseline[name], self._config.guard.tolerance_percent)
            self.latest[name] = verdict
            event = {"event": "guard", "step": step, "domain": name, "language": score.language}
            telemetry.log({**event, "bits_per_byte": score.bits_per_byte, **asdict(verdict)})
            if verdict.action == "warn" and self._topology.rank == 0:
                log.warning(
                    "held-out domain %s is %.2f %% worse than the untouched model (95 %% interval %.2f to %.2f).",
                    *(name, verdict.delta_percent, verdict.ci_low, verdict.ci_high),
                )
        return True

    def table(self) -> str:
        """The last measurement for people: bits per byte of each domain, before and now."""
        width = max(map(len, self.latest), default=0)
        head = f"  {'held-out domain':<{max(width, 15)}}  untouched    now   change %  (95 % interval)"
        rows = [
            f"  {name:<{max(width, 15)}}  {v.baseline:9.3f}  {v.baseline * (1 + v.delta_percent / 100):5.3f}  "
            f"{v.delta_percent:+9.2f}  ({v.ci_low:+.2f} to {v.ci_high:+.2f}){'  WARNING' * (v.action == 'warn')}"
            for name, v in self.latest.items()
        ]
        return "\n".join(["bits per byte", head, *rows])

    def _freeze(self, scores: dict[str, DomainScore], step: int) -> dict[str, DomainScore]:
        if step != 0:
            raise ConfigError(
                f"{self._file} is missing, and at step {step} the untouched model is gone. Restore the file, or go on "
                "with --set guard.enabled=false."
            )
        plain = {
            domain.name: {
                "model": self._model,
                "language": domain.language,
                "content_hash": domain.content_hash,
                "nats": scores[domain.name].nats.tolist(),
                "bytes": scores[domain.name].bytes.tolist(),
            }
            for domain in self._domains
        }
        on_first_rank(self._topology.control_group, lambda: self._write(plain))
        return scores

    def _write(self, content: dict[str, Any]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self._file)

    def _stored_baseline(self) -> dict[str, DomainScore]:
        """Scores of the untouched model on the domains of this run; empty if none were stored.

        Raises:
            ConfigError: a domain holds other text than the one that was measured.
        """
        stored = on_first_rank(
            self._topology.control_group,
            lambda: json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {},
        )
        known = [domain for domain in self._domains if domain.name in stored]
        changed = [domain.name for domain in known if domain.content_hash != stored[domain.name]["content_hash"]]
        if changed:
            raise ConfigError(
                f"{self._file} was measured on other held-out text of {', '.join(changed)} than the data holds now. "
                "Change the data back, or use a new --run_dir."
            )
        others = sorted({stored[domain.name]["model"] for domain in known} - {self._model})
        if others:
            raise ConfigError(
                f"{self._file} holds the scores of another untouched model ({', '.join(others)}) than {self._model}. "
                "Use a new --run_dir."
            )
        if stored and len(known) < len(self._domains) and self._topology.rank == 0:
            names = ", ".join(domain.name for domain in self._domains if domain.name not in stored)
            log.warning("held-out domains %s are new: the untouched model was not measured on them; left out.", names)
        return {
            domain.name: DomainScore(
                name=domain.name,
                language=domain.language,
                nats=np.asarray(stored[domain.name]["nats"]),
                bytes=np.asarray(stored[domain.name]["bytes"]),
            )
            for domain in known
        }
