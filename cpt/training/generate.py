"""Replies to many prompts by all ranks together, in any layout, with a key/value cache.

    prompts -> divided over all ranks -> a pass over as many of them as there is room for
            -> passes of one token a row -> rows that end give their place to waiting prompts
            -> gathered: every rank gets all replies, in the order of the prompts

Decisions
    - Under ZeRO-3 and expert parallelism all ranks have to run every forward pass. They agree on
      the next passes every `AGREED_TOKENS` tokens; a rank without a text runs a filler row.
    - What was drawn is read by the host at the same moments. So nothing waits for the device after
      each token, and a text that ends in between draws a few tokens that nobody reads.
    - Prompts are packed into one row when they are read, so lengths that differ cost nothing.
    - Ranks that share rows in training decode prompts of their own.
    - A text depends on its own prompt and random stream only (cpt/training/sampling.py), so in
      exact arithmetic replies are the same in every layout. Sums in another order can decide
      between two tokens that are as good as equally likely.

Shape letters: B rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from transformers import GptOssConfig

from cpt.model.decoding import KeyValueCache, PromptPass, TokenPass, cache_bytes
from cpt.parallel.agreement import gather_json
from cpt.parallel.topology import Topology
from cpt.resilience.stop import StopRequest
from cpt.storage.transfer import to_device
from cpt.training.sampling import Sampling, draw_tokens, random_stream
from data_pipeline.console.progress import show_progress
from data_pipeline.text.harmony import STOP_IDS

AGREED_TOKENS = 8
"""Tokens of each row between two moments at which ranks agree and the host reads."""
MAX_ROWS = 64
"""Texts that a rank decodes at once, at most."""
CACHE_BYTES = 4 * 2**30
"""Memory of a rank for the key/value cache, if every text became as long as it may."""
PROMPT_PASS_TOKENS = 8192
"""Tokens of the prompts that a rank reads in one pass; a longer prompt is read alone."""
FILLER_TOKEN = 0
"""What a rank without a text reads; every vocabulary has it."""

Report = Callable[[int, int], None]
"""Called on every rank at each agreement, with the finished replies and the tokens drawn so far, of
all ranks together.
"""


@contextmanager
def reporting(
    topology: Topology, num_prompts: int, what: str, beat: Callable[[], None] | None = None
) -> Iterator[Report]:
    """Yield a report that moves a bar on the first rank and calls `beat` on every rank.

    Args:
        topology: The layout.
        num_prompts: Replies that are expected.
        what: Name of the bar.
        beat: Tells the watchdog that this rank is at work; see `cpt.resilience.phase`.
    """
    hidden = topology.rank != 0
    with show_progress(num_prompts, what, "reply", hidden=hidden, leave=False) as bar:

        def report(num_finished: int, num_drawn: int) -> None:
            bar.set_postfix_str(f"{num_drawn} tokens", refresh=False)
            bar.update(num_finished - bar.n)
            if beat is not None:
                beat()

        yield report


class GenerationStopped(Exception):
    """A stop was asked for before all replies were there; raised on all ranks together."""


class Decoder(Protocol):
    """A model that decodes: the training engine, or `cpt.offline.model.OfflineModel`."""

    topology: Topology
    model_config: GptOssConfig
    dtype: torch.dtype
    """Type of keys and values."""

    def next_token_logits(self, cache_pass: PromptPass | TokenPass) -> torch.Tensor:
        """Run a pass; see `cpt.model.decoding.next_token_logits`."""
        ...


@dataclass(kw_only=True, slots=True)
class _Reply:
    """One text that is being written."""

    place: int
    """Place of its prompt among those of the call."""
    prompt: Sequence[int]
    random: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop_ids: Collection[int] = STOP_IDS,
    numbers: Sequence[int] | None = None,
    stop: StopRequest | None = None,
    report: Report | None = None,
    max_rows: int = MAX_ROWS,
    max_cache_bytes: int = CACHE_BYTES,
) -> list[list[int]]:
    """Continue all prompts; all ranks call it together with all prompts and get all replies.

    Args:
        decoder: The model.
        prompts: Tokens, at least one each.
        sampling: How tokens are drawn, and how many at most.
        stop_ids: A text ends after one of these.
        numbers: Number of each prompt, from which its random stream follows; None counts from 0. A
            caller that asks in parts gives the numbers that the prompts have in the whole.
        stop: Looked at on every rank at each agreement.
        report: Told how far all ranks are; see `Report`.
        max_rows: Texts that a rank decodes at once, at most. It does not change the replies.
        max_cache_bytes: Memory of a rank for keys and values; see `cache_bytes` for those of a row.

    Returns:
        The new tokens of each prompt, in order, the one that ended a text included.

    Raises:
        ValueError: a prompt has no tokens.
        GenerationStopped: on all ranks, if a stop was asked for on any.
    """
    empty = [place for place, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"prompts {empty[:5]} have no tokens. Leave them out.")
    if not prompts:
        return []
    topology = decoder.topology
    waiting = []
    for place in range(topology.rank, len(prompts), topology.world_size):
        number = place if numbers is None else numbers[place]
        stream = random_stream(sampling.seed, number)
        waiting.append(_Reply(place=place, prompt=prompts[place], random=stream))
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    row_bytes = cache_bytes(decoder.model_config, longest, decoder.dtype)
    num_rows = max(1, min(max_rows, max_cache_bytes // row_bytes, len(waiting)))
    cache = KeyValueCache(
        decoder.model_config,
        num_rows,
        decoder.dtype,
        topology.device,
        longest_tokens=longest,
    )
    rank = _Rank(decoder, waiting, sampling, frozenset(stop_ids), cache)
    _run(rank, topology, stop, report)
    return _gather(rank.finished, len(prompts), topology)


def _run(rank: _Rank, topology: Topology, stop: StopRequest | None, report: Report | None) -> None:
    """Run passes on all ranks until no rank has a text left.

    Raises:
        GenerationStopped: on all ranks, if a stop was asked for on any.
    """
    while True:
        state = rank.state(wants_stop=stop is not None and stop.requested())
        all_states = _gather_states(state, topology)
        if report is not None:
            report(
                sum(one.num_finished for one in all_states),
                sum(one.num_drawn for one in all_states),
            )
        reads_prompts = any(one.num_admitted for one in all_states)
        steps = min(AGREED_TOKENS, max(one.tokens_left for one in all_states))
        if not reads_prompts and not steps:
            return
        if any(one.wants_stop for one in all_states):
            raise GenerationStopped
        if reads_prompts:
            rank.read_prompts(state.num_admitted)
        if steps:
            rank.draw(steps)


class _State(NamedTuple):
    """One rank before the next passes, in numbers that travel in one collective."""

    num_admitted: int
    """Waiting prompts for which there is room."""
    tokens_left: int
    """Tokens that the text furthest from its end may still draw, without its first."""
    num_finished: int
    """Texts that have ended."""
    num_drawn: int
    """Tokens of all texts of this rank so far."""
    wants_stop: int
    """1 if this rank has been asked to stop."""


def _gather_states(state: _State, topology: Topology) -> list[_State]:
    own = torch.tensor(state)
    parts = [torch.empty_like(own) for _ in range(topology.world_size)]
    dist.all_gather(parts, own, group=topology.control_group)
    return [_State(*part.tolist()) for part in parts]


def _gather(finished: Sequence[_Reply], num_prompts: int, topology: Topology) -> list[list[int]]:
    """Return the replies of all ranks in the order of the prompts."""
    own = {reply.place: reply.tokens for reply in finished}
    replies: list[list[int]] = [[] for _ in range(num_prompts)]
    for part in gather_json(own, topology.control_group):
        for place, tokens in part.items():  # JSON turns the keys into text
            replies[int(place)] = tokens
    return replies


class _Rank:
    """The texts of this rank: those that wait, those in the rows of the cache, and the rest."""

    def __init__(
        self,
        decoder: Decoder,
        waiting: Sequence[_Reply],
        sampling: Sampling,
        stop_ids: frozenset[int],
        cache: KeyValueCache,
    ) -> None:
        self._decoder = decoder
        self._sampling = sampling
        self._stop_ids = stop_ids
        self._device = decoder.topology.device
        self._waiting = deque(waiting)
        self._running: list[_Reply] = []
        """The text of each row in use."""
        self._num_drawn = 0
        self._cache = cache
        self.finished: list[_Reply] = []
        """Texts that have ended."""

    def state(self, *, wants_stop: bool) -> _State:
        """Return how far this rank is."""
        limit = self._sampling.max_new_tokens
        num_admitted = self._num_admitted()
        lefts = [limit - len(reply.tokens) for reply in self._running]
        if num_admitted:
            lefts.append(limit - 1)
        return _State(
            num_admitted=num_admitted,
            tokens_left=max(lefts, default=0),
            num_finished=len(self.finished),
            num_drawn=self._num_drawn,
            wants_stop=int(wants_stop),
        )

    def _num_admitted(self) -> int:
        """Return how many of the waiting prompts are read next."""
        free = self._cache.num_rows - len(self._running)
        num_tokens = 0
        admitted = 0
        for reply in self._waiting:
            num_tokens += len(reply.prompt)
            if admitted == free or (admitted and num_tokens > PROMPT_PASS_TOKENS):
                break
            admitted += 1
        return admitted

    @torch.no_grad()
    def read_prompts(self, num_admitted: int) -> None:
        """Read waiting prompts and draw the first token of their replies; none reads a filler."""
        admitted = [self._waiting.popleft() for _ in range(num_admitted)]
        prompts = [reply.prompt for reply in admitted] or [[FILLER_TOKEN]]
        self._cache.reserve(max(map(len, prompts)))
        first_row = len(self._running) if admitted else None
        logits_BV = self._decoder.next_token_logits(PromptPass(self._cache, prompts, first_row))
        if not admitted:
            return
        uniforms_1B = self._uniforms(admitted, 1)
        tokens_B = draw_tokens(logits_BV, self._sampling, uniforms_1B[0])
        self._running += admitted
        self._take(admitted, tokens_B.unsqueeze(1).tolist())

    @torch.no_grad()
    def draw(self, steps: int) -> None:
        """Draw so many tokens of each row; a rank without a row runs a filler."""
        last_tokens = [reply.tokens[-1] for reply in self._running] or [FILLER_TOKEN]
        lengths = [len(reply.prompt) + len(reply.tokens) for reply in self._running] or [1]
        longest = max(lengths)
        self._cache.reserve(longest + steps - 1)
        tokens_B = to_device(torch.tensor(last_tokens), self._device)
        positions_B = to_device(torch.tensor(lengths) - 1, self._device)
        uniforms_SB = self._uniforms(self._running, steps)
        drawn = []
        for step in range(steps):
            token_pass = TokenPass(self._cache, tokens_B, positions_B + step, longest + step)
            logits_BV = self._decoder.next_token_logits(token_pass)
            tokens_B = draw_tokens(logits_BV, self._sampling, uniforms_SB[step])
            drawn.append(tokens_B)
        if self._running:
            self._take(self._running, torch.stack(drawn, 1).tolist())

    def _uniforms(self, replies: Sequence[_Reply], steps: int) -> torch.Tensor:
        """Return the random numbers of the next tokens, (steps, B) on the device."""
        columns = []
        for reply in replies:
            columns.append(reply.random.random(steps))
        if not columns:
            columns.append(np.zeros(steps))
        return to_device(torch.from_numpy(np.stack(columns, 1)), self._device)

    def _take(self, replies: Sequence[_Reply], drawn: Sequence[Sequence[int]]) -> None:
        """Add drawn tokens to texts as far as these go, and drop the rows that have ended."""
        for reply, tokens in zip(replies, drawn, strict=True):
            for token in tokens:
                if reply.is_done:
                    break
                reply.tokens.append(token)
                self._num_drawn += 1
                is_full = len(reply.tokens) == self._sampling.max_new_tokens
                reply.is_done = is_full or token in self._stop_ids
        self._drop_finished()

    def _drop_finished(self) -> None:
        """Give the rows of texts that have ended to the last ones that go on."""
        going_on = []
        for row, reply in enumerate(self._running):
            if reply.is_done:
                self.finished.append(reply)
            else:
                going_on.append(row)
        free = []
        for row in range(len(going_on)):
            if self._running[row].is_done:
                free.append(row)
        moved = [row for row in going_on if row >= len(going_on)]
        self._cache.move(moved, free)
        for source, target in zip(moved, free, strict=True):
            self._running[target] = self._running[source]
        del self._running[len(going_on) :]
