"""The one check of a config.json: types, ranges, and what its keys say about each other.

transformers checks little of it, and that by stack traces, or in the first step.  Every problem is
one sentence with the key, its value and what it must be.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import GptOssConfig

from cpt.model.configuration_keys import ARCHITECTURES, MODEL_TYPE, key_problems
from data_pipeline.config.strict_yaml import nearest
from data_pipeline.escaping import escaped_line

LAYER_TYPES = ("sliding_attention", "full_attention")
DTYPES = ("bfloat16", "float32", "float16", "float64")
IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
WHOLE_NUMBERS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**17),
    "intermediate_size": (1, 2**18),
    "num_hidden_layers": (1, 1024),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "head_dim": (2, 4096),
    "num_local_experts": (1, 4096),
    "num_experts": (1, 4096),
    "num_experts_per_tok": (1, 4096),
    "max_position_embeddings": (1, 2**31),
    "num_labels": (0, 10_000),
}
"""Smallest and largest values; the largest are far beyond any model, and keep checks quick."""
MAX_PARAMETERS = 10**13
"""Parameters of the largest model; each value of one without end may be within its own bounds."""
NUMBERS = {
    "rms_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 100.0),
    "swiglu_alpha": (0.0, 1e6),
    "swiglu_limit": (0.0, 1e6),
    "router_aux_loss_coef": (0.0, 1e6),
    "rope_theta": (1.0, 1e15),
}
BOOLEANS = ("attention_bias", "output_router_logits", "use_cache")
ONLY_VALUES = {"attention_dropout": 0, "tie_word_embeddings": False, "hidden_act": "silu"}
"""Keys that may have one value only, because the model computes nothing else."""
ROPE_KEYS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        (
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "original_max_position_embeddings",
        ),
    ),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "attention_factor", "original_max_position_embeddings"),
    ),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        (),
    ),
}
"""Keys that a form of RoPE needs, and that it may have, beside its name and `rope_theta`."""
ROPE_NUMBERS = {
    "factor": (1.0, 1e6),
    "rope_theta": (1.0, 1e15),
    "attention_factor": (0.0, 1e6),
    "beta_fast": (0.0, 1e6),
    "beta_slow": (0.0, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
    "low_freq_factor": (0.0, 1e6),
    "high_freq_factor": (0.0, 1e6),
}
MAY_BE_NULL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
SHOWN_CHARACTERS = 80
"""Characters of a value that a message shows."""


def config_problems(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the content of a gpt-oss config.json; empty if nothing is."""
    problems = key_problems(values)
    problems += _class_problems(values)
    for key, (low, high) in WHOLE_NUMBERS.items():
        if key in values and not is_whole(values[key], low, high):
            problems.append(must_be(key, values[key], f"a whole number from {low} to {high}"))
    for key, (least, most) in NUMBERS.items():
        if key in values and not is_number(values[key], least, most):
            problems.append(must_be(key, values[key], f"a number from {least:g} to {most:g}"))
    for key in BOOLEANS:
        if key in values and not isinstance(values[key], bool):
            problems.append(must_be(key, values[key], "true or false"))
    for key, only in ONLY_VALUES.items():
        value = values.get(key, only)
        # False equals 0 for Python, not for a reader of the file
        if value != only or isinstance(value, bool) != isinstance(only, bool):
            problems.append(must_be(key, value, f"{_shown(only)}: nothing else is trained here"))
    problems += _dtype_problems(values)
    problems += _quantization_problems(values)
    problems += _name_problems(values)
    if problems:  # sums over wrong values would only say the same again
        return problems
    return [
        *_size_problems(values),
        *_layer_problems(values),
        *_id_problems(values),
        *_rope_problems(values),
    ]


def is_whole(value: object, low: int, high: int) -> bool:
    """Return whether a value is a whole number, which a bool is not, between two others."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object, low: float, high: float) -> bool:
    """Return whether a value is a finite number, which a bool is not, between two others."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high


def must_be(key: str, value: object, wanted: str) -> str:
    """Return the sentence on a wrong value."""
    return f"{key} is {_shown(value)}, must be {wanted}."


def _shown(value: object) -> str:
    names = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    text = ascii(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _value(values: Mapping[str, Any], key: str) -> Any:
    """Return a value, or what transformers takes if the key is missing."""
    return values.get(key, getattr(GptOssConfig, key, None))


def _class_problems(values: Mapping[str, Any]) -> list[str]:
    """Return why another class than that of gpt-oss would be taken."""
    problems = []
    model_type = values.get("model_type", MODEL_TYPE)
    if model_type != MODEL_TYPE:
        problems.append(must_be("model_type", model_type, f"'{MODEL_TYPE}'"))
    architectures = values.get("architectures")
    if architectures is not None and architectures != ARCHITECTURES:
        problems.append(must_be("architectures", architectures, f"{ARCHITECTURES} or null"))
    return problems


def _dtype_problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in ("dtype", "torch_dtype"):
        value = values.get(key)
        if value is not None and value not in DTYPES:
            problems.append(must_be(key, value, f"one of {', '.join(DTYPES)}, or null"))
    return problems


def _quantization_problems(values: Mapping[str, Any]) -> list[str]:
    quantization = values.get("quantization_config")
    if quantization is None:
        return []
    if not isinstance(quantization, dict):
        return [must_be("quantization_config", quantization, "an object or null")]
    method = quantization.get("quant_method", "mxfp4")
    if method == "mxfp4":
        return []
    words = escaped_line(method if isinstance(method, str) else _shown(method), SHOWN_CHARACTERS)
    return [
        f"the weights are quantized by {words}; "
        "training starts from bf16, fp32 or the released MXFP4."
    ]


def _name_problems(values: Mapping[str, Any]) -> list[str]:
    """Return the keys that would take the place of a method of the configuration."""
    problems = []
    for key in values:
        if callable(getattr(GptOssConfig, key, None)):
            problems.append(f"{_shown(key)} is no key of a configuration. Remove it.")
    return problems


def _size_problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    heads = _value(values, "num_attention_heads")
    kv_heads = _value(values, "num_key_value_heads")
    if heads % kv_heads:
        problems.append(
            must_be("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
        )
    head_dim = _value(values, "head_dim")
    if head_dim % 2:
        problems.append(must_be("head_dim", head_dim, "even: RoPE rotates pairs"))
    both = [values[key] for key in ("num_experts", "num_local_experts") if key in values]
    if len(both) == 2 and both[0] != both[1]:
        wanted = f"num_local_experts ({both[1]}), which it stands for"
        problems.append(must_be("num_experts", both[0], wanted))
    experts = values.get("num_experts", _value(values, "num_local_experts"))
    top_k = _value(values, "num_experts_per_tok")
    if top_k > experts:
        problems.append(
            must_be("num_experts_per_tok", top_k, f"at most the number of experts ({experts})")
        )
    experts_numel = (
        3 * experts * _value(values, "hidden_size") * _value(values, "intermediate_size")
    )
    numel = _value(values, "num_hidden_layers") * experts_numel
    if numel > MAX_PARAMETERS:
        problems.append(
            f"num_hidden_layers, hidden_size, intermediate_size and num_local_experts make "
            f"{numel:.1e} parameters of experts, must be at most {MAX_PARAMETERS:.0e} in all."
        )
    return problems


def _layer_problems(values: Mapping[str, Any]) -> list[str]:
    window = _value(values, "sliding_window")
    if window is not None and not is_whole(window, 1, 2**31):
        return [must_be("sliding_window", window, "a whole number of at least 1, or null")]
    num_layers = _value(values, "num_hidden_layers")
    layer_types = values.get("layer_types")
    if layer_types is None:
        layer_types = [LAYER_TYPES[index % 2] for index in range(num_layers)]
    if not isinstance(layer_types, list):
        return [must_be("layer_types", layer_types, "a list of names, one of each layer")]
    problems = []
    if len(layer_types) != num_layers:
        problems.append(
            f"layer_types names {len(layer_types)} layers, must name num_hidden_layers "
            f"({num_layers})."
        )
    for index, name in enumerate(layer_types):
        if name not in LAYER_TYPES:
            close = nearest(name, LAYER_TYPES) if isinstance(name, str) else ""
            wanted = f"one of {', '.join(LAYER_TYPES)}"
            problems.append(must_be(f"layer_types[{index}]", name, wanted) + close)
            break  # the others are likely to be wrong in the same way
    if window is None and LAYER_TYPES[0] in layer_types:
        problems.append(
            "sliding_window is null, but layer_types has sliding layers. Give the window in "
            "tokens, or name all layers full_attention."
        )
    return problems


def _id_problems(values: Mapping[str, Any]) -> list[str]:
    vocab_size = _value(values, "vocab_size")
    problems = []
    for key in IDS:
        value = values.get(key)
        ids = value if key == "eos_token_id" and isinstance(value, list) else [value]
        for number in ids:
            if number is not None and not is_whole(number, 0, vocab_size - 1):
                wanted = f"an id of the vocabulary, 0 to {vocab_size - 1}, or null"
                problems.append(must_be(key, value, wanted))
                break
    return problems


def _rope_problems(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with RoPE in the form of transformers 5, of 4, or both side by side."""
    problems = []
    forms = {}
    for key in ("rope_parameters", "rope_scaling"):
        form = values.get(key)
        if isinstance(form, dict):
            problems += _form_problems(key, form, values)
            forms[key] = form
        elif form is not None:
            problems.append(must_be(key, form, "an object or null"))
    if values.get("partial_rotary_factor") not in (None, 1):
        value = values["partial_rotary_factor"]
        problems.append(must_be("partial_rotary_factor", value, "1: whole heads are rotated"))
    return problems or _rope_contradictions(values, forms)


def _rope_contradictions(
    values: Mapping[str, Any], forms: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Return where the form of transformers 5 and that of 4 say different things."""
    problems = []
    new = dict(forms.get("rope_parameters", {}))
    old = dict(forms.get("rope_scaling", {}))
    if "rope_theta" in values:
        old.setdefault("rope_theta", values["rope_theta"])
    for form in (new, old):
        if "type" in form:
            form.setdefault("rope_type", form.pop("type"))
    for key in sorted(new.keys() & old.keys()):
        if new[key] != old[key]:
            problems.append(
                f"{key} of RoPE is {_shown(new[key])} in rope_parameters, {_shown(old[key])} in "
                "rope_scaling or rope_theta. Make them equal, or remove one of the two."
            )
    return problems


def _form_problems(name: str, form: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with one object of RoPE parameters."""
    for layer_type in LAYER_TYPES:
        if layer_type in form:
            return [
                f"{name} has parameters of its own for {layer_type}; all layers of gpt-oss share "
                "theirs. Give one object for all layers."
            ]
    if not form:
        return []
    kind = form.get("rope_type", form.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        return [must_be(f"{name}.rope_type", kind, f"one of {', '.join(ROPE_KEYS)}")]
    problems = []
    needed, allowed = ROPE_KEYS[kind]
    for key in needed:
        if key not in form:
            problems.append(f"{name}.{key} is missing, which rope_type {kind} needs.")
    for key, value in form.items():
        if key in ("rope_type", "type"):
            continue
        if key == "partial_rotary_factor" and value in (None, 1):
            continue
        if key not in (*needed, *allowed, "rope_theta"):
            problems.append(f"{name}.{ascii(key)[1:-1]} is no key of rope_type {kind}. Remove it.")
            continue
        wanted = _wanted_of_rope(key, value, values)
        if wanted:
            problems.append(must_be(f"{name}.{key}", value, wanted))
    return problems or _order_problems(name, form)


def _order_problems(name: str, form: Mapping[str, Any]) -> list[str]:
    problems = []
    fast = form.get("beta_fast") or 32
    slow = form.get("beta_slow") or 1
    if fast <= slow:
        problems.append(must_be(f"{name}.beta_fast", fast, f"more than beta_slow ({slow})"))
    high = form.get("high_freq_factor", math.inf)
    low = form.get("low_freq_factor", 0)
    if high <= low:
        wanted = f"more than low_freq_factor ({low})"
        problems.append(must_be(f"{name}.high_freq_factor", high, wanted))
    return problems


def _wanted_of_rope(key: str, value: object, values: Mapping[str, Any]) -> str:
    """Return what a RoPE parameter must be, or an empty string if it is so."""
    if value is None and key in MAY_BE_NULL:
        return ""
    if key == "truncate":
        return "" if isinstance(value, bool) else "true or false"
    if key == "original_max_position_embeddings":
        return "" if is_whole(value, 1, 2**31) else "a whole number of at least 1"
    if key in ("short_factor", "long_factor"):
        pairs = _value(values, "head_dim") // 2
        is_list = isinstance(value, list) and len(value) == pairs
        if is_list and all(is_number(factor, 1e-6, 1e6) for factor in value):  # type: ignore[attr-defined]
            return ""
        return f"a list of {pairs} numbers, one of each pair of a head"
    low, high = ROPE_NUMBERS[key]
    return "" if is_number(value, low, high) else f"a number from {low:g} to {high:g}"
