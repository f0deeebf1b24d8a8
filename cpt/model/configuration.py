"""The model's configuration: published presets, and the config.json of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GptOssConfig

from cpt.errors import ConfigError
from cpt.model.configuration_check import config_problems
from cpt.model.configuration_keys import COMPUTING_KEYS, MODEL_TYPE, known_values
from cpt.model.missing_model import CONFIG, why_no_config, why_no_model
from cpt.model.weights.hf_layout import read_json

_SHARED: dict[str, Any] = {
    "vocab_size": 201_088,
    "sliding_window": 128,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "pad_token_id": 199_999,
    "bos_token_id": 199_998,
    "eos_token_id": 200_002,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.9,
    "tie_word_embeddings": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_SHARED,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "gpt-oss-20b": {
        **_SHARED,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
    },
    "gpt-oss-120b": {
        **_SHARED,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
}
"""Published configurations (model card, arXiv 2508.10925, and the released config.json), and a tiny
one of the same architecture: alternating window and full layers, grouped heads, sinks, YaRN,
experts with biases.
"""


def load_config(
    path: Path | None, preset: str | None, *, option: str = "model.path"
) -> GptOssConfig:
    """Return the model's configuration, from a directory's config.json or a preset of `init`.

    Args:
        path: A Hugging Face directory; None for a preset.
        preset: One of `PRESETS`.
        option: What a person has named the directory with.

    Raises:
        ConfigError: There is no gpt-oss configuration, or one that this project cannot train.
    """
    if path is None:
        return GptOssConfig(**PRESETS[str(preset)])
    file = path / CONFIG
    if not file.is_file():
        raise ConfigError(f"{option}: {why_no_model(path)}")
    values = read_json(file)
    if values.get("model_type") != MODEL_TYPE:
        raise ConfigError(why_no_config(path, values.get("model_type")))
    return config_of_values(values, str(file))


def config_of_values(values: Mapping[str, Any], where: str) -> GptOssConfig:
    """Return the configuration that a JSON object describes, after the one check of it.

    Only the keys of the architecture go into it (`cpt.model.configuration_keys`).

    Args:
        values: The object, from a config.json or from a checkpoint of another.
        where: Where it is from, for the message.

    Raises:
        ConfigError: It is not sound, or names code.
    """
    problems = config_problems(values)
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    try:
        return GptOssConfig(**known_values(values))
    except Exception as error:  # transformers raises whatever it comes across
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where}: transformers refuses it ({type(error).__name__}: {reason}). Correct the key "
            "that this names, or fetch the file again."
        ) from error


def differing_keys(one: GptOssConfig, other: GptOssConfig) -> list[str]:
    """Return the keys of the architecture in which two configurations differ, in order."""
    mine = one.to_dict()
    theirs = other.to_dict()
    return [key for key in COMPUTING_KEYS if mine.get(key) != theirs.get(key)]
