"""Values of the DeepSpeed JSON that a start would choke on are told with file, line and key, and
values that pass are values that DeepSpeed takes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cpt.config.engine_json import KNOWN_KEYS, KNOWN_ZERO_KEYS, OWN_KEYS, json_problems
from cpt.config.engine_values import KEYS_OF_BLOCKS
from cpt.deepspeed_adapter.json_values import block_problems
from data_pipeline.config.strict_yaml import load_json

ROOT = Path(__file__).resolve().parents[2]


def problems_of(folder: Path, **keys: Any) -> list[str]:
    file = folder / "ds.json"
    content = {"zero_optimization": {"stage": 3}, **keys}
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
    located = load_json(file)
    return [*json_problems(located), *block_problems(located)]


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 3} | keys}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (zero(reduce_bucket_size=3686.4), "reduce_bucket_size is 3686.4"),
        (zero(reduce_bucket_size="1000"), 'reduce_bucket_size is "1000", must be a number'),
        (zero(reduce_bucket_size=True), "reduce_bucket_size is true, must be a number"),
        (zero(sub_group_size=-1), "sub_group_size is -1"),
        (zero(sub_group_size=2**70), "must be a number below 2^63"),
        (zero(overlap_comm="maybe"), 'overlap_comm is "maybe"'),
        (zero(contiguous_gradients=None), "contiguous_gradients is null"),
        (zero(offload_optimizer={"device": "cpu", "pin_memory": 3}), "pin_memory is 3"),
        (zero(offload_optimizer={"device": "cpu", "pinned": True}), "pinned is not a known key"),
        ({"bf16": {"enabeld": True}}, "bf16.enabeld is not a known key. Did you mean"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "kept in fp32; remove it"),
        ({"bf16": {"bf16_optimizer_states": True}}, "says how moments are held; remove it"),
        ({"communication_data_type": "fp16"}, "overflows in fp16"),
        ({"communication_data_type": "fp8"}, '"fp8", which is no dtype here'),
        ({"communication_data_type": 16}, "is 16, which is no dtype here"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, "grad_accum_dtype is"),
        ({"data_types": {"grad_accum_dtype": "Half"}}, "overflows in fp16"),
        ({"data_types": {"grad_accum_dtype": "float"}}, '"float", which is no dtype here'),
        ({"data_types": {"param_dtype": "torch.float16"}}, "overflows in fp16"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "grad_acum_dtype is not a known key"),
        ({"data_types": {"keep_in_fp32_modules": 3}}, "must be 'auto' or a list"),
        ({"torch_autocast": {"enabled": True, "dtype": "fp16"}}, "Write bf16"),
        ({"torch_autocast": {"enabled": True}}, "torch would take fp16"),
        ({"torch_autocast": {"dtype": ["bf16"]}}, "Write bf16"),
        ({"torch_autocast": True}, "must be a mapping"),
        ({"steps_per_print": 0}, "steps_per_print is 0, must be a whole number >= 1"),
        ({"steps_per_print": 2.5}, "steps_per_print is 2.5"),
        ({"prescale_gradients": True}, "ZeRO divides gradients"),
        ({"gradient_predivide_factor": 2}, "ZeRO divides gradients"),
        ({"gradient_predivide_factor": True}, "ZeRO divides gradients"),
        ({"wall_clock_breakdown": "yes"}, "must be true or false"),
        ({"flops_profiler": {"enabled": 1}}, "must be true or false"),
        ({"flops_profiler": {"steps": 1}}, "flops_profiler.steps is not a known key"),
        ({"comms_logger": {"prof_ops": "all"}}, "comms_logger.prof_ops"),
        ({"compile": {"deepcompile": "x"}}, "compile.deepcompile"),
        ({"aio": {"use_gds": True}}, "mapped into memory"),
    ],
)
def test_value_is_refused_with_line_and_key(
    tmp_path: Path, keys: dict[str, Any], words: str, capfd: Any
) -> None:
    problems = problems_of(tmp_path, **keys)
    assert words in "\n".join(problems)
    assert all("ds.json:" in problem for problem in problems)
    assert capfd.readouterr() == ("", "")


def test_all_problems_are_told_together(tmp_path: Path) -> None:
    keys = {**zero(sub_group_size=-1, overlap_comm="x"), "steps_per_print": 0}
    assert len(problems_of(tmp_path, **keys)) == 3


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.name)
def test_shipped_files_have_no_problem(file: Path) -> None:
    located = load_json(file)
    assert [*json_problems(located), *block_problems(located)] == []


@pytest.mark.parametrize(
    "keys",
    [
        zero(reduce_bucket_size=5e8, overlap_comm=None, stage3_prefetch_bucket_size="auto"),
        {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "bf16"}},
        {"communication_data_type": None, "gradient_predivide_factor": 1.0},
        {"torch_autocast": {"enabled": False}, "bf16": {"enabled": "auto"}},
    ],
)
def test_value_that_deepspeed_takes_is_accepted(tmp_path: Path, keys: dict[str, Any]) -> None:
    assert problems_of(tmp_path, **keys) == []


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["auto", "fp16", "fp32", "bf16", "cpu", "none", "true", "3", "1e4", ""]),
    # a NUL and half a surrogate pair are refused before anybody looks at values
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=4),
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=2), max_leaves=3)
NESTED = ["enabled", "device", "pin_memory", "ratio", *KNOWN_ZERO_KEYS]
for names in KEYS_OF_BLOCKS.values():
    NESTED += names
BLOCKS = st.dictionaries(st.sampled_from(sorted(set(NESTED))), VALUES, max_size=3)
KEYS = st.sampled_from([key for key in KNOWN_KEYS if key not in OWN_KEYS])


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(keys=st.dictionaries(KEYS, VALUES | BLOCKS, max_size=2), zero_keys=BLOCKS)
def test_any_value_is_refused_or_taken_by_deepspeed(
    tmp_path: Path, keys: dict[str, Any], zero_keys: dict[str, Any]
) -> None:
    content = {**keys, **zero(**{**zero_keys, "stage": 3})}
    problems = problems_of(tmp_path, **content)
    assert all(isinstance(problem, str) for problem in problems)
    assume(not problems)
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "optimizer"):
        content.pop(name, None)
    content |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    DeepSpeedConfig({**content, "bf16": {}, "gradient_clipping": 1.0})
