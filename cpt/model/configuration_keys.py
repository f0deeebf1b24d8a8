"""Which keys of a config.json reach the model and an export, and which are refused.

A model's directory is made by others, and transformers takes every key of its config.json: it sets
unknown ones as attributes of the configuration, where some of them name code.  A kernel on the Hub
in `attn_implementation` is fetched and run, `auto_map` names Python files, and `attribute_map`
changes what all other keys mean.  Here only the keys of the architecture are passed on.  A key
that names code or other files is refused, so that nobody serves the directory elsewhere in good
faith; any other key has no meaning for gpt-oss and is left aside.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "gpt_oss"
ARCHITECTURES = ["GptOssForCausalLM"]
KNOWN_KEYS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "layer_types",
    "max_position_embeddings",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "output_router_logits",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "router_aux_loss_coef",
    "sliding_window",
    "swiglu_alpha",
    "swiglu_limit",
    "tie_word_embeddings",
    "torch_dtype",
    "use_cache",
    "vocab_size",
)
"""The keys that say what a gpt-oss computes, in the words of transformers 4 and 5."""
COMPUTING_KEYS = (
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "layer_types",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_local_experts",
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    "swiglu_alpha",
    "swiglu_limit",
    "vocab_size",
)
"""Those of `KNOWN_KEYS`, as transformers 5 has them, in which two models may not differ if the same
code is to compute both.
"""
REFUSED_KEYS = {
    "auto_map": "names Python files that are to run in place of transformers' own classes",
    "custom_pipelines": "names Python files that are to run in place of transformers' own",
    "custom_generate": "names Python code that is to write the replies",
    "attribute_map": "gives other keys another meaning",
    "fusion_config": "replaces parts of the model",
    "kernel_config": "names kernels that are to be fetched and run",
    "per_layer_config": "gives single layers other sizes; the layers of gpt-oss differ in their "
    "window only",
    "speculators_config": "names another model, which vLLM fetches and serves in place of this one",
    "transformers_weights": "names another file of weights, which this project does not read",
}
"""Keys that name code or files, or change what others mean, and what each of them does."""
IMPLEMENTATION_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
)
LIBRARY_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flex_attention",
    "flash_attention_2",
    "flash_attention_3",
    "flash_attention_4",
    "grouped_mm",
    "batched_mm",
)
"""Values of `IMPLEMENTATION_KEYS` that name nothing to fetch; what a model computes with is chosen
by the run and not by its directory, so that they are left aside.
"""


def known_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that says what a gpt-oss computes."""
    known = {}
    for key in KNOWN_KEYS:
        if key in values:
            known[key] = values[key]
    return known


def key_problems(values: Mapping[str, Any]) -> list[str]:
    """Return why a config.json is not taken from others: keys that name code or other files."""
    problems = []
    for key, what in REFUSED_KEYS.items():
        if values.get(key) is not None:
            problems.append(f"{key} {what}. {_cure('the key')}")
    return problems + implementation_problems(values)


def implementation_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the keys that name an implementation which is to be fetched."""
    problems = []
    for key in IMPLEMENTATION_KEYS:
        value = values.get(key)
        if value is not None and value not in LIBRARY_IMPLEMENTATIONS:
            problems.append(
                f"{key} names code that is to be fetched and run; the values without code are "
                f"{', '.join(LIBRARY_IMPLEMENTATIONS)}. {_cure('the key')}"
            )
    return problems


def _cure(what: str) -> str:
    return f"Nothing of the kind is run here: remove {what}, or fetch the model from its makers."
