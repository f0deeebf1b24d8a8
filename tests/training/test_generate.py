"""Replies from the cache are those of plain transformers, whatever is decoded beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, LogitsProcessorList, TopPLogitsWarper

from cpt.model.attention.reference import cached_attention
from cpt.model.decoding import (
    KeyValueCache,
    PromptPass,
    TokenPass,
    cache_bytes,
    decoding_attention,
)
from cpt.offline.model import OfflineModel
from cpt.training import generate as generate_module
from cpt.training.generate import GenerationStopped, generate
from cpt.training.sampling import Sampling, draw_tokens, random_stream
from tests.dist.cases import WINDOW, decoding_model
from tests.support.decoders import VOCAB_SIZE, small_decoder

SHORT = [5, 17, 300, 42]
AT_THE_WINDOW = [*range(100, 100 + WINDOW)]
LONG = [token * 7 % 500 for token in range(2 * WINDOW + 9)]
PROMPTS = [SHORT, LONG, [7], AT_THE_WINDOW, [*range(40)], LONG[5:]]


class AskedToStop:
    """A request to stop that arrives after some looks."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    def requested(self) -> bool:
        self._looks -= 1
        return self._looks < 0


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineModel]:
    with small_decoder(tmp_path_factory.mktemp("model")) as model:
        yield model


def plain_reply(prompt: list[int], num_tokens: int, stop_id: int | None = None) -> list[int]:
    """Return the greedy reply of plain transformers."""
    ids = torch.tensor([prompt])
    out = _plain_model().generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=stop_id,
        pad_token_id=511,
    )
    reply: list[int] = out[0, len(prompt) :].tolist()
    return reply


_PLAIN: dict[str, Any] = {}


def _plain_model() -> Any:
    if not _PLAIN:
        _PLAIN["model"] = decoding_model(VOCAB_SIZE, num_layers=4)
    return _PLAIN["model"]


def test_greedy_replies_are_those_of_transformers_past_the_window(decoder: OfflineModel) -> None:
    num_tokens = WINDOW + 13
    replies = generate(decoder, PROMPTS, Sampling(max_new_tokens=num_tokens), stop_ids=[])
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        assert reply == plain_reply(prompt, num_tokens)


def plain_logits(text: list[int]) -> torch.Tensor:
    """Return plain transformers' logits of the token after a text, without a cache."""
    with torch.no_grad():
        out = _plain_model()(input_ids=torch.tensor([text]), use_cache=False, logits_to_keep=1)
    return out.logits[0, -1]


def test_cached_logits_are_those_of_a_whole_forward_after_a_row_has_moved(
    decoder: OfflineModel,
) -> None:
    """Three texts are read, two are extended, the first one ends, and its row is taken over."""
    texts = [list(SHORT), list(LONG), list(AT_THE_WINDOW)]
    cache = small_cache(decoder, longest_tokens=len(LONG) + WINDOW + 3)
    cache.reserve(len(LONG))
    found = decoder.next_token_logits(PromptPass(cache, texts[:2], 0))
    assert_logits(found, texts[:2])
    assert_logits(decoder.next_token_logits(PromptPass(cache, texts[2:], 2)), texts[2:])
    for step in range(WINDOW + 3):
        if step == 3:
            cache.move([2], [0])
            texts = [texts[2], texts[1]]
        for row, text in enumerate(texts):
            text.append((31 * step + 7 * row) % 500)
        longest = max(map(len, texts))
        cache.reserve(longest)
        tokens_B = torch.tensor([text[-1] for text in texts])
        positions_B = torch.tensor([len(text) - 1 for text in texts])
        found = decoder.next_token_logits(TokenPass(cache, tokens_B, positions_B, longest))
        if step in (0, 2, 3, WINDOW + 2):
            assert_logits(found, texts)


def small_cache(decoder: OfflineModel, *, longest_tokens: int) -> KeyValueCache:
    """Return a cache of three rows."""
    device = torch.device("cpu")
    return KeyValueCache(
        decoder.model_config, 3, decoder.dtype, device, longest_tokens=longest_tokens
    )


def test_a_cache_grows_by_half_but_not_beyond_the_longest_text(decoder: OfflineModel) -> None:
    cache = small_cache(decoder, longest_tokens=100)
    for needed, capacity in ((40, 40), (41, 60), (55, 60), (61, 90), (91, 100), (100, 100)):
        cache.reserve(needed)
        assert cache.capacity_tokens == capacity
    cache.reserve(104)  # a row that has ended runs on until the ranks agree again
    assert cache.capacity_tokens == 104


def assert_logits(found_BV: torch.Tensor, texts: list[list[int]]) -> None:
    for logits_V, text in zip(found_BV, texts, strict=True):
        expected_V = plain_logits(text)
        difference_V = (logits_V - expected_V).abs()
        # fp32 sums are taken in another order; the logits have a standard deviation of about 1.5
        assert float(difference_V.max()) <= 1e-4, f"{len(text)} tokens: {difference_V.max()}"


def test_logits_of_bf16_weights_are_fp32_before_a_token_is_chosen(decoder: OfflineModel) -> None:
    texts = [SHORT, AT_THE_WINDOW, LONG]
    rounded = OfflineModel(decoder.model_config, decoder.topology)
    rounded._model.load_state_dict(decoder._model.state_dict())
    rounded._model.bfloat16()
    rounded.dtype = torch.bfloat16
    cache = small_cache(rounded, longest_tokens=len(LONG))
    cache.reserve(len(LONG))
    found_BV = rounded.next_token_logits(PromptPass(cache, texts, 0))
    greedy = generate(rounded, texts, Sampling(max_new_tokens=1), stop_ids=[])
    assert found_BV.dtype == torch.float32
    assert torch.equal(found_BV, found_BV.bfloat16().float()), "the product is that of the weights"
    assert greedy == [[int(token)] for token in found_BV.argmax(-1)]


def test_replies_do_not_depend_on_what_is_decoded_beside_them(decoder: OfflineModel) -> None:
    """Rows are refilled when two are there for six prompts, and texts end at different times."""
    sampling = Sampling(max_new_tokens=21, temperature=1.0, top_p=0.95, seed=3)
    stops = set(range(0, 512, 16))
    together = generate(decoder, PROMPTS, sampling, stop_ids=stops)
    in_two_rows = generate(decoder, PROMPTS, sampling, stop_ids=stops, max_rows=2)
    alone = []
    for number, prompt in enumerate(PROMPTS):
        alone += generate(decoder, [prompt], sampling, stop_ids=stops, numbers=[number])
    assert together == in_two_rows == alone
    assert len({len(reply) for reply in together}) > 2, "texts must end at different times"
    for reply in together:
        assert len(reply) == 21 or reply[-1] in stops
        assert not stops.intersection(reply[:-1])


def test_little_memory_makes_fewer_rows_and_the_same_replies(
    decoder: OfflineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    class Watched(KeyValueCache):
        def __init__(
            self, config: GptOssConfig, num_rows: int, *others: Any, longest_tokens: int
        ) -> None:
            sizes.append(num_rows)
            super().__init__(config, num_rows, *others, longest_tokens=longest_tokens)

    monkeypatch.setattr(generate_module, "KeyValueCache", Watched)
    sampling = Sampling(max_new_tokens=6)
    longest = max(map(len, PROMPTS)) + 6
    row = cache_bytes(decoder.model_config, longest, torch.float32)
    plenty = generate(decoder, PROMPTS, sampling, stop_ids=[])
    three_rows = generate(decoder, PROMPTS, sampling, stop_ids=[], max_cache_bytes=3 * row)
    too_little = generate(decoder, PROMPTS, sampling, stop_ids=[], max_cache_bytes=1)
    assert sizes == [6, 3, 1]
    assert plenty == three_rows == too_little


def test_prompts_of_several_passes_give_the_same_replies(
    decoder: OfflineModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later prompts are read while earlier texts are half written."""
    sampling = Sampling(max_new_tokens=11)
    at_once = generate(decoder, PROMPTS, sampling, stop_ids=[])
    passes = []

    class Watched(PromptPass):
        def __init__(self, cache: KeyValueCache, prompts: Any, first_row: int | None) -> None:
            passes.append([len(prompt) for prompt in prompts])
            super().__init__(cache, prompts, first_row)

    monkeypatch.setattr(generate_module, "PromptPass", Watched)
    monkeypatch.setattr(generate_module, "PROMPT_PASS_TOKENS", 72)
    assert generate(decoder, PROMPTS, sampling, stop_ids=[]) == at_once
    assert passes == [[4], [73], [1, 32], [40], [68]]


def test_seed_and_number_of_a_prompt_decide_its_reply(decoder: OfflineModel) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=1)
    first, second = generate(decoder, [SHORT, SHORT], sampling, stop_ids=[])
    assert first != second
    assert generate(decoder, [SHORT], sampling, stop_ids=[], numbers=[1]) == [second]
    other_seed = Sampling(max_new_tokens=12, temperature=1.0, seed=2)
    assert generate(decoder, [SHORT], other_seed, stop_ids=[]) != [first]


def test_text_ends_with_its_stop_token_or_at_the_limit(decoder: OfflineModel) -> None:
    (whole,) = generate(decoder, [SHORT], Sampling(max_new_tokens=20), stop_ids=[])
    stop = whole[9]
    end = whole.index(stop) + 1
    assert generate(decoder, [SHORT], Sampling(max_new_tokens=20), stop_ids=[stop]) == [whole[:end]]
    assert generate(decoder, [SHORT], Sampling(max_new_tokens=1), stop_ids=[]) == [whole[:1]]


def test_report_counts_up_to_all_replies(decoder: OfflineModel) -> None:
    told: list[tuple[int, int]] = []
    replies = generate(
        decoder,
        PROMPTS,
        Sampling(max_new_tokens=20),
        stop_ids=[],
        max_rows=2,
        report=lambda finished, tokens: told.append((finished, tokens)),
    )
    assert told == sorted(told)
    assert told[0] == (0, 0)
    assert told[-1] == (len(PROMPTS), sum(map(len, replies)))
    # a text of 20 tokens takes three reports, and two texts run at once
    assert len(told) >= 9


def test_stop_request_ends_it_at_the_next_agreement(decoder: OfflineModel) -> None:
    stop: Any = AskedToStop(looks=2)
    with pytest.raises(GenerationStopped):
        generate(decoder, PROMPTS, Sampling(max_new_tokens=100), stop_ids=[], stop=stop)


def test_prompt_without_tokens_is_refused(decoder: OfflineModel) -> None:
    with pytest.raises(ValueError, match=r"prompts \[1\] have no tokens"):
        generate(decoder, [SHORT, []], Sampling())
    assert generate(decoder, [], Sampling()) == []


def test_one_query_of_a_row_attends_as_the_definition_does() -> None:
    """The rows of a cache have different lengths, the definition takes rows of one length."""
    generator = torch.Generator().manual_seed(5)
    q_BHD = torch.randn(3, 8, 16, generator=generator)
    k_BKUD = torch.randn(3, 2, 20, 16, generator=generator)
    v_BKUD = torch.randn(3, 2, 20, 16, generator=generator)
    sinks_H = torch.linspace(-3, 9, 8)
    lengths = [20, 1, 7]
    allowed_BU = torch.arange(20) < torch.tensor(lengths)[:, None]
    out_BHD = decoding_attention(q_BHD, k_BKUD, v_BKUD, sinks_H, allowed_BU, 0.25)
    for row, length in enumerate(lengths):
        expected_1H1D = cached_attention(
            q_BHD[row, None, :, None],
            k_BKUD[row, None, :, :length],
            v_BKUD[row, None, :, :length],
            sinks_H,
            None,
            None,
            0.25,
        )
        difference = (out_BHD[row] - expected_1H1D[0, :, 0]).abs()
        # the same products in fp32, summed in another order
        assert float(difference.max()) <= 1e-6, f"row {row}: {difference.max()}"


def test_attention_of_bf16_takes_its_softmax_in_fp32() -> None:
    generator = torch.Generator().manual_seed(6)
    shape = (2, 2, 300, 16)
    q_BHD = torch.randn(2, 4, 16, generator=generator).bfloat16()
    k_BKUD = torch.randn(shape, generator=generator).bfloat16()
    v_BKUD = torch.randn(shape, generator=generator).bfloat16()
    sinks_H = torch.zeros(4)
    allowed_BU = torch.ones(2, 300, dtype=torch.bool)
    low = decoding_attention(q_BHD, k_BKUD, v_BKUD, sinks_H, allowed_BU, 0.25)
    high = decoding_attention(
        q_BHD.double(), k_BKUD.double(), v_BKUD.double(), sinks_H, allowed_BU, 0.25
    )
    # rounding keeps order, and sums in fp32 are off by less than 1e-6 here
    assert torch.all(low >= (high - 1e-6).bfloat16())
    assert torch.all(low <= (high + 1e-6).bfloat16())


def test_drawn_tokens_have_their_probabilities() -> None:
    logits_1V = torch.log(torch.tensor([[0.5, 0.05, 0.3, 0.15]]))
    uniforms_B = torch.arange(0, 1, 1 / 2000, dtype=torch.float64) + 1 / 4000
    logits_BV = logits_1V.expand(2000, 4)
    tokens_B = draw_tokens(logits_BV, Sampling(temperature=1.0), uniforms_B)
    assert torch.bincount(tokens_B, minlength=4).tolist() == [1000, 100, 600, 300]
    cooler_B = draw_tokens(logits_BV, Sampling(temperature=0.5), uniforms_B)
    squares = np.array([0.25, 0.0025, 0.09, 0.0225])
    expected = 2000 * squares / squares.sum()
    found = torch.bincount(cooler_B, minlength=4).numpy()
    # evenly spaced numbers give each token its share, up to one
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.79, 0.81, 0.999])
def test_nucleus_is_that_of_transformers(top_p: float) -> None:
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(9))
    processor = LogitsProcessorList([TopPLogitsWarper(top_p)])
    kept_BV = torch.isfinite(processor(torch.zeros(4, 1), logits_BV.clone()))
    uniforms_N = torch.arange(0, 1, 1 / 4000, dtype=torch.float64)
    for logits_V, kept_V in zip(logits_BV, kept_BV, strict=True):
        logits_NV = logits_V.expand(len(uniforms_N), -1)
        sampling = Sampling(temperature=1.0, top_p=top_p)
        drawn = set(draw_tokens(logits_NV, sampling, uniforms_N).tolist())
        assert drawn == set(kept_V.nonzero().flatten().tolist())


def test_logits_that_are_not_finite_draw_a_token_of_the_vocabulary() -> None:
    logits_1V = torch.full((1, 8), torch.nan)
    drawn = draw_tokens(logits_1V, Sampling(temperature=1.0), torch.zeros(1, dtype=torch.float64))
    assert drawn.tolist() == [7]


def test_random_streams_of_seeds_and_numbers_differ() -> None:
    drawn = set()
    for seed in range(3):
        for number in range(3):
            drawn.add(random_stream(seed, number).random())
    assert len(drawn) == 9
    assert random_stream(2, 1).random() == random_stream(2, 1).random()
