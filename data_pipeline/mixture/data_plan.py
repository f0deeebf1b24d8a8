"""What a run will draw from each source, computed with the very function that training uses.

Decisions
    An impossible run fails here, not at step 40,000: every reason is in `DataPlan.problems`.
    What is unwise but possible is a warning: a source read more than WARN_EPOCHS times teaches
    little more (Muennighoff et al., arXiv 2305.16264: up to 4 epochs are nearly as good as new
    text). Tokens are not content.  The same text costs about JAPANESE_PREMIUM times the tokens in
    Japanese, so half the tokens are less than half of what is said.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.mixture import Mixture
from data_pipeline.tables import table

WARN_EPOCHS = 4.0
JAPANESE_PREMIUM = 1.32
"""Tokens of a Japanese text over those of the same text in English: 1.27 to 1.38, Debian's parallel
documentation.
"""
_CURVE_POINTS = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PlannedSource:
    """One source over a whole run."""

    name: str
    language: str
    documents: int
    """Documents to train on."""
    tokens: int
    """Predicted tokens in one epoch."""
    rows: int
    """Rows in one epoch."""
    bytes_per_token: float
    """UTF-8 bytes per token of its documents."""
    drawn_tokens: int
    """Predicted tokens that the run takes."""
    epochs: float
    """Rows drawn per row there is: how often the text is read, on average."""
    share: float
    """Of the run's predicted tokens, 0 to 1."""
    read_once_at_step: int | None
    """Step, within one, at which every row was drawn once; None if the run ends before."""
    max_epochs: float | None
    """Limit of the mix."""
    epoch_curve: tuple[float, ...]
    """Epochs at `DataPlan.curve_steps`."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataPlan:
    """A run over a built mix."""

    steps: int
    global_batch_size: int
    """Packed rows per step."""
    sources: tuple[PlannedSource, ...]
    limits: tuple[tuple[str, float, float, bool], ...]
    """(language, floor, ceiling, met) for each language that the mix bounds."""
    curve_steps: tuple[int, ...]
    problems: tuple[str, ...]
    """Why the run cannot be done; empty if it can."""
    warnings: tuple[str, ...]
    """What a person should think about."""

    @property
    def drawn_tokens(self) -> int:
        """Predicted tokens of the run."""
        return sum(source.drawn_tokens for source in self.sources)

    def language_shares(self) -> dict[str, float]:
        """Share of the predicted tokens by language, 0 to 1."""
        shares: dict[str, float] = {}
        for source in self.sources:
            shares[source.language] = shares.get(source.language, 0.0) + source.share
        return shares

    def content_shares(self) -> dict[str, float]:
        """`language_shares`, a Japanese token counted as 1 / JAPANESE_PREMIUM of one in another
        language.
        """
        worth = {
            name: s / (JAPANESE_PREMIUM if name == "ja" else 1)
            for name, s in self.language_shares().items()
        }
        total = sum(worth.values()) or 1.0
        return {name: value / total for name, value in worth.items()}

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        keys = ("steps", "global_batch_size", "curve_steps", "problems", "warnings")
        return {
            **{key: getattr(self, key) for key in keys},
            "drawn_tokens": self.drawn_tokens,
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "language_shares": self.language_shares(),
            "content_shares": self.content_shares(),
            "limits": [
                {"language": name, "min_share": low, "max_share": high, "met": met}
                for name, low, high, met in self.limits
            ],
        }

    def describe(self) -> str:
        """A table for people, then shares, limits and warnings."""
        header = (
            "source",
            "language",
            "documents",
            "tokens",
            "rows",
            "bytes/token",
            "drawn tokens",
            "share",
        )
        rows = [
            (
                *(
                    s.name,
                    s.language,
                    f"{s.documents:,}",
                    f"{s.tokens:,}",
                    f"{s.rows:,}",
                    f"{s.bytes_per_token:.2f}",
                ),
                *(f"{s.drawn_tokens:,}", f"{s.share:.2%}", f"{s.epochs:.2f}"),
                "-" if s.read_once_at_step is None else f"{s.read_once_at_step:,}",
            )
            for s in self.sources
        ]
        shares, content = self.language_shares(), self.content_shares()
        text = [
            table((*header, "epochs", "read once at step"), rows),
            f"{self.steps:,} steps of {self.global_batch_size:,} rows: {self.drawn_tokens:,} predicted tokens",
            "languages: " + ", ".join(f"{name} {share:.2%}" for name, share in shares.items()),
        ]
        if 0 < shares.get("ja", 0) < 1:
            text.append(
                f"the same text costs about {JAPANESE_PREMIUM:g} times the tokens in Japanese: by content "
                + ", ".join(f"{name} {share:.1%}" for name, share in content.items())
            )
        for name, low, high, met in self.limits:
            text.append(
                f"limit: {name} from {low:.0%} to {high:.0%}: {'met' if met else 'NOT MET'}"
            )
        return "\n".join([*text, *(f"warning: {line}" for line in self.warnings)])


def make_data_plan(
    built: BuiltData,
    mix: MixConfig,
    steps: int,
    global_batch_size: int,
    ledger: Ledger | None = None,
) -> DataPlan:
    """Draw `steps` steps without reading a token.

    Args:
        built: the build of `mix`.
        mix: gives limits and seed.
        steps: of the run.
        global_batch_size: packed rows per step.
        ledger: the mix over the run, if it was edited on the way; None: `mix` from start to end.
    """
    ledger = ledger or Ledger.start(mix)
    mixture = Mixture(built, ledger, mix.seed)
    end = mixture.position(steps, global_batch_size)
    curve_steps = tuple(
        np.unique(np.linspace(0, steps, min(steps, _CURVE_POINTS) + 1).astype(int)).tolist()
    )
    drawn = np.array([mixture.position(step, global_batch_size).drawn_rows for step in curve_steps])
    tokens = [
        _drawn_tokens(mixture, built, number, end.drawn_rows[number])
        for number in range(len(mix.sources))
    ]
    total = max(sum(tokens), 1)
    entries = {entry.name: entry for entry in built.manifest.sources}
    sources = []
    for number, (name, config) in enumerate(zip(built.source_names, mix.sources, strict=True)):
        rows, entry = built.num_rows(number), entries[name]
        curve = drawn[:, number] / max(rows, 1)
        once = None
        if rows and end.drawn_rows[number] >= rows:
            once = int(np.ceil(np.interp(rows, drawn[:, number], curve_steps)))
        sources.append(
            PlannedSource(
                name=name,
                language=built.languages[number],
                documents=entry.documents,
                tokens=entry.predicted_tokens,
                rows=rows,
                bytes_per_token=entry.bytes / max(entry.tokens, 1),
                drawn_tokens=tokens[number],
                epochs=end.drawn_rows[number] / max(rows, 1),
                share=tokens[number] / total,
                read_once_at_step=once,
                max_epochs=config.max_epochs,
                epoch_curve=tuple(curve.round(6).tolist()),
            )
        )
    plan = DataPlan(
        steps=steps,
        global_batch_size=global_batch_size,
        sources=tuple(sources),
        limits=(),
        curve_steps=curve_steps,
        problems=(),
        warnings=(),
    )
    return _judged(plan, mix, ledger)


def _drawn_tokens(mixture: Mixture, built: BuiltData, source: int, rows: int) -> int:
    """Predicted tokens in the first `rows` rows that are drawn from a source."""
    row_tokens = built.row_tokens(source)
    if not len(row_tokens):
        return 0
    epochs, rest = divmod(rows, len(row_tokens))
    return epochs * int(row_tokens.sum()) + int(mixture.epoch_tokens(source, epochs)[:rest].sum())


def _judged(plan: DataPlan, mix: MixConfig, ledger: Ledger) -> DataPlan:
    """`plan` with limits, problems and warnings."""
    problems, warnings, limits = [], [], []
    for source in plan.sources:
        if source.max_epochs is not None and source.epochs > source.max_epochs:
            step = int(np.interp(source.max_epochs, source.epoch_curve, plan.curve_steps))
            problems.append(
                f"source '{source.name}': {plan.steps} steps take {source.epochs:.2f} epochs, max_epochs is "
                f"{source.max_epochs:g}, which is used up near step {step:,}. "
                "Train fewer steps, add data, lower its weight, or raise max_epochs."
            )
        elif source.epochs > WARN_EPOCHS:
            step = int(np.interp(WARN_EPOCHS, source.epoch_curve, plan.curve_steps))
            warnings.append(
                f"source '{source.name}' is read {source.epochs:.1f} times, more than {WARN_EPOCHS:g} from step "
                f"{step:,} on. Add data or lower its weight."
            )
    for language, bounds in mix.languages.items():
        share = plan.language_shares().get(language, 0.0)
        slack = ledger.slack_rows(language) * mix.seq_len / max(plan.drawn_tokens, 1)
        met = bounds.min_share - slack <= share <= bounds.max_share + slack
        limits.append((language, bounds.min_share, bounds.max_share, met))
        if not met:
            problems.append(
                f"language '{language}': has {share:.2%} of the tokens, must have from {bounds.min_share:.2%} to "
                f"{bounds.max_share:.2%}. Change the weights."
            )
    return dataclasses.replace(
        plan, limits=tuple(limits), problems=tuple(problems), warnings=tuple(warnings)
    )
