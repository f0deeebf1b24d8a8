"""Replies of a finished model to the prompts of a list, in pieces that survive the process.

    prompts -> spans of bounded length -> generate (cpt/training/generate.py) -> pieces

Decisions
    A stop does not wait for the end of a span: the ranks leave at the next agreement of `generate`.
    The span in progress is sampled again at the next start, so spans are short in tokens, too.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpt.offline.model import OfflineModel
from cpt.offline.pieces import ItemSeries, Pieces, Report
from cpt.offline.rank_options import RankOptions
from cpt.training.generate import generate
from cpt.training.sampling import Sampling

SPAN_TOKENS = 2**17
"""Tokens that a rank may draw between two saves, if every reply became as long as it may."""


def prompts_of_rank(options: RankOptions, sampling: Sampling) -> int:
    """Return how many prompts a rank answers between two saves, at least one."""
    return max(1, min(options.save_every, SPAN_TOKENS // sampling.max_new_tokens))


def compute_replies(
    pieces: Pieces,
    series: ItemSeries,
    model: OfflineModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    numbers: Sequence[int],
) -> None:
    """Sample the replies that no piece holds yet; all ranks call it together.

    Args:
        pieces: What is sampled; the value of an item is the list of its tokens.
        series: The prompts, as items.
        model: The model.
        prompts: Tokens of each prompt.
        sampling: How tokens are drawn.
        numbers: Number of each prompt, from which its random stream follows.

    Raises:
        RequeueRequested: on all ranks, if any has been asked to stop; finished spans stay.
    """
    ranks = pieces.ranks

    def compute(span: range, report: Report) -> list[list[int]]:
        return generate(
            model,
            [prompts[index] for index in span],
            sampling,
            numbers=[numbers[index] for index in span],
            stop=ranks.options.stop,
            report=report,
        )

    span_length = prompts_of_rank(ranks.options, sampling) * ranks.topology.world_size
    pieces.compute_together(series, compute, span_length=span_length)
