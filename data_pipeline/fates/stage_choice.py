"""Which stage of sequence length each training document of a source is in.

Decisions
    A document is in one stage, all of it, so that no stage repeats what another one has taught.
    Every stage gets its share of the tokens of every source. Stages choose from the last, which has
    the longest rows, to the first, which takes what is left. Stage k of shares s_0 .. s_k takes
    s_k / (s_0 + .. + s_k) of the tokens that the stages behind it have left.
    A keyed hash of the content decides which documents. Without `min_tokens` nothing else does: the
    order of the documents, other documents and the seed do not matter, and copies stay together.
    With `min_tokens` the documents of at least that length come first, and shorter ones fill up
    where a source has too few of them. How many of either kind follows from the tokens of the
    source, so there a longer source may move a document; the rows of a source are others then, too.
    A conversation is never cut: one that does not fit the rows of the stages before is taken.
    A source with at least as many documents as stages has one in each of them, whatever the hashes
    say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.config.stage_config import StageConfig
from data_pipeline.reading.content_hashes import Hashes
from data_pipeline.store.hashing import splitmix64
from data_pipeline.store.packing import Integers, Segments

StageNumbers = npt.NDArray[np.uint8]
"""Number of the stage of each document."""
Mask = npt.NDArray[np.bool_]
_SALT = "stages of sequence length 1"


def split_by_stage(
    segments: Segments, hashes: Hashes, stages: Sequence[StageConfig], *, is_chat: bool
) -> list[Segments]:
    """Return the segments of each stage; those of one document are in one stage.

    Args:
        segments: What a source trains on.
        hashes: Content hash of each of those documents, in the order of their numbers.
        stages: The stages of the mix.
        is_chat: Whether the documents are conversations.
    """
    documents, position = np.unique(segments.document, return_inverse=True)
    tokens = np.zeros(len(documents), np.int64)
    np.add.at(tokens, position, segments.tokens)
    chosen = choose_stages(hashes, tokens, stages, is_chat=is_chat)[position]
    return [segments.chosen(chosen == number) for number in range(len(stages))]


def choose_stages(
    hashes: Hashes, tokens: Integers, stages: Sequence[StageConfig], *, is_chat: bool
) -> StageNumbers:
    """Return the number of the stage that each training document of a source is in, [documents].

    Args:
        hashes: Content hash of each document.
        tokens: Tokens of each document that are trained on, its end included.
        stages: The stages of the mix; no conversation is longer than a row of the last one.
        is_chat: Whether the documents are conversations.
    """
    chosen = np.zeros(len(hashes), np.uint8)
    left = np.ones(len(hashes), bool)
    share_so_far = np.cumsum([stage.share for stage in stages])
    for number in range(len(stages) - 1, 0, -1):
        order = _order(hashes, number)
        forced = np.zeros(len(hashes), bool)
        if is_chat:
            forced = left & (tokens - 1 > stages[number - 1].seq_len)
        share = stages[number].share / float(share_so_far[number])
        taken = _take(order, tokens, left, forced, share, stages[number].min_tokens)
        taken = _with_one_for_each(order, taken, left, forced, number)
        chosen[taken] = number
        left &= ~taken
    return chosen


def _take(
    order: npt.NDArray[np.uint64],
    tokens: Integers,
    left: Mask,
    forced: Mask,
    share: float,
    min_tokens: int,
) -> Mask:
    """Return the documents that a stage takes of those that are left.

    Args:
        order: Fresh bits of each document; the smallest ones are taken.
        tokens: Tokens of each document.
        left: Documents that no later stage has taken.
        forced: Documents among them that must be taken.
        share: Share of their tokens that the stage is to have.
        min_tokens: Length of the documents that come first.
    """
    if not min_tokens and not forced.any():
        return left & _below(order, share)
    wanted = share * int(tokens[left].sum()) - int(tokens[forced].sum())
    taken = forced.copy()
    is_long = tokens >= min_tokens
    for candidates in (left & ~forced & is_long, left & ~forced & ~is_long):
        available = int(tokens[candidates].sum())
        if wanted <= 0 or not available:
            continue
        taken |= candidates & _below(order, wanted / available)
        wanted -= available
    return taken


def _with_one_for_each(
    order: npt.NDArray[np.uint64], taken: Mask, left: Mask, forced: Mask, num_before: int
) -> Mask:
    """Move documents so that this stage has at least one, and each stage before it can have one.

    Args:
        order: Fresh bits of each document.
        taken: Documents that the stage takes by their hashes.
        left: Documents that no later stage has taken.
        forced: Documents among them that must be taken.
        num_before: Number of stages before this one.
    """
    num_left = int(np.count_nonzero(left))
    most = max(num_left - num_before, 0)
    num_taken = int(np.count_nonzero(taken))
    if 0 < num_taken <= most:
        return taken
    taken = taken.copy()
    if not num_taken and most:
        candidates = np.flatnonzero(left)
        taken[candidates[np.argmin(order[candidates])]] = True
        return taken
    free = np.flatnonzero(taken & ~forced)
    by_order = free[np.argsort(order[free], kind="stable")]
    num_back = min(num_taken - most, len(by_order))
    taken[by_order[len(by_order) - num_back :]] = False
    return taken


def _below(order: npt.NDArray[np.uint64], share: float) -> Mask:
    if share >= 1:
        return np.ones(len(order), bool)
    return np.asarray(order < np.uint64(int(share * 2**64)))


def _order(hashes: Hashes, number: int) -> npt.NDArray[np.uint64]:
    """Return 64 fresh bits per document, from its content hash and the number of a stage."""
    digest = hashlib.sha256(f"{_SALT}: {number}".encode()).digest()
    key = np.uint64(int.from_bytes(digest[:8], "little"))
    high = splitmix64(hashes["high"].astype(np.uint64) ^ key)
    return splitmix64(high ^ hashes["low"].astype(np.uint64))
