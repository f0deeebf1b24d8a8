"""`register()` on plain Hugging Face gpt-oss models: training on packed rows, generation, refusals.

Shape letters: B rows, S tokens of a row, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from cpt.model.attention import PackedRows, choose, register, sink_attention

WINDOW = 8
PACKED = [list(range(11)) + list(range(20)) + [0] + list(range(5)), list(range(37))]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Waiting for one another costs threads more than work of these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def registered() -> None:
    assert register() == register() == "sink"


def tiny_config(**changes: Any) -> GptOssConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
        "pad_token_id": None,
        "eos_token_id": None,
    }
    return GptOssConfig(**(sizes | changes))


def tiny_model(attention: str, dtype: torch.dtype = torch.float64) -> Any:
    """Build the same model with either attention, with no bias or sink near 0 to hide errors."""
    config = tiny_config()
    config._attn_implementation = attention
    config._experts_implementation = "eager"
    model: Any = GptOssForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        spread = 1.0 if "sinks" in name else 0.3
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.to(dtype)


def document_masks(position_ids: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Build the 4-D masks that keep documents apart in eager attention, which ignores positions."""
    token = torch.arange(position_ids.shape[1])
    first_BS = token - position_ids
    visible_BSS = (token <= token[:, None]) & (token >= first_BS[:, :, None])
    windowed_BSS = visible_BSS & (token[:, None] - token < WINDOW)

    def additive(visible: Tensor) -> Tensor:
        return (
            torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf).unsqueeze(1)
        )

    return {"full_attention": additive(visible_BSS), "sliding_attention": additive(windowed_BSS)}


def packed_batch() -> tuple[Tensor, Tensor]:
    position_ids = torch.tensor(PACKED)
    return torch.randint(
        0, 97, position_ids.shape, generator=torch.Generator().manual_seed(1)
    ), position_ids


def loss_and_gradients(model: Any, **inputs: Any) -> dict[str, Tensor]:
    input_ids, position_ids = packed_batch()
    loss = model(
        input_ids=input_ids, labels=input_ids, position_ids=position_ids, use_cache=False, **inputs
    ).loss
    loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    assert len(gradients) == len(list(model.parameters()))
    return {"loss": loss.detach(), **gradients}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], limit: float) -> None:
    """Compare in l2, relative to each tensor."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        difference = (got[name] - tensor).abs()
        error = (difference.norm() / tensor.norm()).item()
        assert error <= limit, (
            f"{name}: relative l2 {error:.2e}, largest {difference.max():.2e}, "
            f"mean {difference.mean():.2e}"
        )


@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["fp64", "fp32"]
)
def test_loss_and_all_gradients_are_those_of_eager_with_document_masks(
    dtype: torch.dtype, limit: float
) -> None:
    """fp64 shows equality; fp32 has the roundings of four layers behind it."""
    want = loss_and_gradients(
        tiny_model("eager", dtype), attention_mask=document_masks(packed_batch()[1], dtype)
    )
    assert_close(loss_and_gradients(tiny_model("sink", dtype)), want, limit)


def test_eager_without_masks_leaks_across_documents() -> None:
    """If this fails, transformers keeps documents apart; the comparison above proves nothing."""
    with pytest.raises(AssertionError, match="relative l2"):
        assert_close(
            loss_and_gradients(tiny_model("sink")), loss_and_gradients(tiny_model("eager")), 1e-3
        )


@pytest.mark.parametrize(
    "given",
    [
        {"packed_rows": PackedRows.from_position_ids(torch.tensor(PACKED))},
        {"kernel": "reference"},
        {"kernel": "cpu"},
        {"attention_mask": torch.ones(2, 37)},
        {"attention_mask": {"full_attention": None, "sliding_attention": None}},
    ],
    ids=["packed_rows", "reference", "cpu", "all-ones mask", "empty masks"],
)
def test_keyword_arguments_of_the_model_call_reach_the_attention(given: dict[str, Any]) -> None:
    assert_close(
        loss_and_gradients(tiny_model("sink"), **given),
        loss_and_gradients(tiny_model("sink")),
        1e-10,
    )


def test_packed_rows_win_over_positions() -> None:
    rows = PackedRows.from_bounds([(0, 9, 37), (0, 37)], 37)
    model = tiny_model("sink")
    input_ids, position_ids = packed_batch()
    plain = model(input_ids, position_ids=position_ids, use_cache=False).logits
    cut = model(input_ids, position_ids=position_ids, use_cache=False, packed_rows=rows).logits
    assert torch.equal(plain[0, :9], cut[0, :9])
    assert not torch.allclose(plain[0, 9:], cut[0, 9:])


def test_activation_checkpointing_changes_no_bit() -> None:
    model = tiny_model("sink")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    got = loss_and_gradients(model)
    want = loss_and_gradients(tiny_model("sink").train())
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_positions_are_read_once_per_forward_and_again_when_they_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[int] = []
    original = PackedRows.from_position_ids

    def counted(position_ids: Tensor) -> PackedRows:
        read.append(len(position_ids))
        return original(position_ids)

    monkeypatch.setattr(PackedRows, "from_position_ids", counted)
    model = tiny_model("sink")
    input_ids, position_ids = packed_batch()
    first = model(input_ids, position_ids=position_ids, use_cache=False).logits
    assert read == [2]
    position_ids[0] = torch.arange(37)
    second = model(input_ids, position_ids=position_ids, use_cache=False).logits
    assert read == [2, 2]
    assert not torch.allclose(first[0, 20:], second[0, 20:])
    with torch.inference_mode():
        model(input_ids, position_ids=position_ids.clone(), use_cache=False)


def test_every_way_to_name_the_attention_works(tmp_path: Path) -> None:
    input_ids, position_ids = packed_batch()
    model = tiny_model("sink", torch.float32)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sink")
    built = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="sink")  # type: ignore[no-untyped-call]
    built.load_state_dict(model.state_dict())
    switched = tiny_model("eager", torch.float32)
    switched.set_attn_implementation("sink")
    want = model(input_ids, position_ids=position_ids, use_cache=False).logits
    for other in (loaded, built, switched):
        assert other.config._attn_implementation == "sink"
        got = other(input_ids, position_ids=position_ids, use_cache=False).logits
        # The experts of the first two sum in another order, as transformers' default differs from
        # `tiny_model`.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "prompt_tokens", [3, 13], ids=["prompt within the window", "prompt beyond the window"]
)
def test_greedy_generation_with_a_cache_is_that_of_eager(prompt_tokens: int) -> None:
    prompts = torch.randint(0, 97, (2, prompt_tokens), generator=torch.Generator().manual_seed(2))
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompts),
        "max_new_tokens": 15,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    got, want = (tiny_model(name).eval().generate(prompts, **options) for name in ("sink", "eager"))
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-10, atol=1e-10)


def test_a_cache_of_packed_documents_goes_on_with_the_last_one() -> None:
    model = tiny_model("sink").eval()
    input_ids, position_ids = packed_batch()
    want = model(input_ids, position_ids=position_ids, use_cache=False).logits
    head = model(input_ids[:, :33], position_ids=position_ids[:, :33], use_cache=True)
    tail = model(
        input_ids[:, 33:], position_ids=position_ids[:, 33:], past_key_values=head.past_key_values
    )
    torch.testing.assert_close(
        torch.cat([head.logits, tail.logits], 1), want, rtol=1e-10, atol=1e-10
    )


def test_a_mask_with_padding_is_refused_with_the_way_out() -> None:
    input_ids, _ = packed_batch()
    mask = torch.ones_like(input_ids)
    mask[1, 30:] = 0
    with pytest.raises(ValueError, match=r"hides 7 of 74 tokens.*let position_ids restart"):
        tiny_model("sink")(input_ids, attention_mask=mask)


def test_a_static_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="a static cache, which sink attention cannot read"):
        tiny_model("sink").generate(
            packed_batch()[0], max_new_tokens=3, cache_implementation="static"
        )


def qkv(
    num_heads: int = 8, num_kv_heads: int = 2, num_tokens: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    q_BHSD = torch.randn(1, num_heads, num_tokens, 16, generator=generator)
    k_BKSD, v_BKSD = (
        torch.randn(1, num_kv_heads, num_tokens, 16, generator=generator) for _ in range(2)
    )
    return q_BHSD, k_BKSD, v_BKSD


def call(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, **changes: Any) -> Tensor:
    given: dict[str, Any] = {
        "attention_mask": None,
        "scaling": 0.25,
        "s_aux": torch.zeros(q_BHSD.shape[1]),
    }
    out_BSHD, weights = sink_attention(nn.Identity(), q_BHSD, k_BKSD, v_BKSD, **(given | changes))
    assert weights is None
    return out_BSHD


def _refusals() -> Iterator[tuple[Callable[[], Tensor], str]]:
    q, k, v = qkv()
    one_row = PackedRows.from_bounds([(0, 6)], 6)
    yield (
        lambda: call(q, k, v, attention_mask=torch.zeros(1, 1, 6, 6)),
        r"takes no mask, got one of shape \(1, 1, 6, 6\)",
    )
    yield lambda: call(q, k, v, dropout=0.1), "attention dropout is 0.1, must be 0"
    yield lambda: call(q, k, v, s_aux=None), "needs the sinks"
    yield lambda: call(q, k, v, s_aux=torch.zeros(4)), r"sinks have shape \(4,\), must be \(8,\)"
    yield lambda: call(*qkv(num_heads=9)), "2 key/value heads do not divide 9 query heads"
    yield lambda: call(q, k[:, :, :4], v[:, :, :4]), "6 queries meet 4 keys"
    yield lambda: call(q, k[:, :, :4], v), r"key \(1, 2, 4, 16\), value \(1, 2, 6, 16\)"
    yield lambda: call(q, k[..., :8], v[..., :8]), "differ in rows or head size"
    yield lambda: call(q, k.double(), v), "torch.float32, torch.float64, torch.float32"
    yield (
        lambda: call(q, k, v, s_aux=torch.zeros(8, device="meta")),
        r"different devices: \['cpu', 'meta'\]",
    )
    yield (
        lambda: call(q, k, v, packed_rows=PackedRows.from_bounds([(0, 7)], 7)),
        "1 rows of 7 tokens, attention got 1",
    )
    yield lambda: call(q[:, :, -1:], k, v, packed_rows=one_row), "with a key/value cache"
    yield (
        lambda: call(q, k, v, position_ids=torch.zeros(1, 5)),
        r"position_ids have shape \(1, 5\), must be \(1, 6\)",
    )
    yield lambda: call(q, k, v, cu_seq_lens_q=torch.tensor([0, 6])), "does not read cu_seq_lens_q"
    yield lambda: call(q, k, v, kernel="flash"), "unknown attention 'flash'"
    yield (
        lambda: call(q, k, v, sequence_parallel=SplitHeads(0, 2)),
        "needs packed_rows of the whole rows",
    )


@pytest.mark.parametrize(
    ("refused", "message"), list(_refusals()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_cannot_be_computed_is_refused(refused: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()


class SplitHeads:
    """The exchange as rank `rank` of `size` sees it, in a process that has all tokens and heads."""

    halo = None

    def __init__(self, rank: int, size: int, head_groups: int = 1) -> None:
        self.rank = rank
        self.size = size
        self.head_groups = head_groups

    def _local(self, x: Tensor, dim: int) -> Tensor:
        return x.chunk(self.size, dim)[self.rank]

    def _of_group(self, x: Tensor, dim: int, group: int) -> Tensor:
        return self._local(x, dim).chunk(self.head_groups, dim)[group]

    def start_qkv(self, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, group: int) -> Any:
        parts = tuple(self._of_group(x, 1, group) for x in (q_BHSD, k_BKSD, v_BKSD))
        return SimpleNamespace(finish=lambda: parts)

    def local_sinks(self, sinks_H: Tensor, group: int) -> Tensor:
        return self._of_group(sinks_H, 0, group)

    def start_out(self, out_BTHD: Tensor) -> Tensor:
        return out_BTHD

    def join_out(self, returning: list[Tensor]) -> Tensor:
        return torch.cat(returning, dim=2)


def test_each_rank_of_a_sequence_parallel_group_uses_the_sinks_of_its_heads() -> None:
    q, k, v = qkv()
    given: dict[str, Any] = {
        "s_aux": torch.linspace(-2, 2, 8),
        "packed_rows": PackedRows.from_bounds([(0, 2, 6)], 6),
    }
    parts = [call(q, k, v, sequence_parallel=SplitHeads(rank, 2), **given) for rank in range(2)]
    torch.testing.assert_close(torch.cat(parts, dim=2), call(q, k, v, **given))


def test_groups_of_heads_attend_as_all_heads_at_once() -> None:
    q, k, v = qkv()
    given: dict[str, Any] = {
        "s_aux": torch.linspace(-2, 2, 8),
        "packed_rows": PackedRows.from_bounds([(0, 2, 6)], 6),
    }
    grouped = call(q, k, v, sequence_parallel=SplitHeads(0, 1, head_groups=2), **given)
    assert torch.equal(grouped, call(q, k, v, **given))


def test_a_kernel_is_given_by_name_or_as_it_is() -> None:
    reference = choose("reference", device=torch.device("cpu"), dtype=torch.float32, head_dim=16)
    assert torch.equal(call(*qkv(), kernel=reference), call(*qkv(), kernel="reference"))


def test_without_positions_each_row_is_one_document() -> None:
    q, k, v = qkv()
    assert torch.equal(call(q, k, v), call(q, k, v, position_ids=torch.arange(6)[None]))
