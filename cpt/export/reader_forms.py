"""The configuration of an export in the words of every transformers that is claimed to read it.

transformers 4.55 and 4.57 read `rope_theta` and `rope_scaling`, 4.55 reads `torch_dtype`, and 5
writes `rope_parameters` and `dtype`.  A reader that misses its own word takes a default without a
word, so an export has both, and they agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GptOssConfig, __version__

from cpt.model.configuration_keys import ARCHITECTURES, MODEL_TYPE, known_values
from cpt.offline.plain_tokenizer import BOS, PAD
from data_pipeline.text.harmony import STOP_IDS
from data_pipeline.text.tokenizer import encoding

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
"""Known to transformers 4 and 5; 5 itself writes a name that 4 does not know."""


def exported_config(config: GptOssConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of weights that are written in a dtype.

    It has the keys of the architecture and nothing else that the directory or the checkpoint of
    another may have named: no code, no other files, no kernels.

    Args:
        config: The model's configuration.
        dtype: The dtype of the weights, `bfloat16` or `float32`.
    """
    full = with_old_keys(known_values(config.to_dict()), dtype)
    full["architectures"] = ARCHITECTURES
    full["model_type"] = MODEL_TYPE
    full["transformers_version"] = __version__
    return full


def with_old_keys(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config.json with RoPE and dtype in the words of transformers 4 beside those of 5.

    Args:
        config: The configuration in the form of transformers 5, or with both.
        dtype: The dtype of the weights, `bfloat16` or `float32`.
    """
    full = dict(config)
    full["dtype"] = dtype
    full["torch_dtype"] = dtype
    rope = full.get("rope_parameters")
    if rope:
        scaling = dict(rope)
        own_theta = full.get("rope_theta", GptOssConfig.default_theta)
        full["rope_theta"] = scaling.pop("rope_theta", own_theta)
        # null says "no scaling" to transformers 4, and "see rope_parameters" to 5
        full["rope_scaling"] = None if scaling.get("rope_type") == "default" else scaling
    return full


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json; ids that the model's configuration lacks are the tokenizer's.

    The released configuration has no bos_token_id.
    """
    special = encoding()._special_tokens
    bos = config.get("bos_token_id")
    pad = config.get("pad_token_id")
    return {
        "bos_token_id": special[BOS] if bos is None else bos,
        # end of text, end of a turn and a tool call all end a generation
        "eos_token_id": list(STOP_IDS),
        "pad_token_id": special[PAD] if pad is None else pad,
        "do_sample": True,
    }
