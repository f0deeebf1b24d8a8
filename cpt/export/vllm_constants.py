"""What vLLM takes for granted of every gpt-oss, whatever config.json says.

Source: one stored version, whose date is not known, of vLLM's
vllm/model_executor/models/gpt_oss.py: RMSNorm(eps=1e-5), a window where the layer's index is even,
RoPE of type YaRN, and the activation `swigluoai`, for which no limit and no alpha is read from the
configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RMS_NORM_EPS = 1e-5
SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0
LAYER_TYPES = ("sliding_attention", "full_attention")
"""Types of the layers with an even index, and with an odd one."""


def vllm_differences(config: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each value that vLLM would not read; none for the released models.

    Args:
        config: An export's config.json; what it leaves out is as in the released models.
    """
    found = []
    values = {
        "rms_norm_eps": (config.get("rms_norm_eps"), RMS_NORM_EPS),
        "swiglu_alpha": (config.get("swiglu_alpha"), SWIGLU_ALPHA),
        "swiglu_limit": (config.get("swiglu_limit"), SWIGLU_LIMIT),
        "rope_type": ((config.get("rope_parameters") or {}).get("rope_type"), "yarn"),
    }
    for key, (value, fixed) in values.items():
        if value is not None and value != fixed:
            found.append(_sentence(key, value, fixed))
    for index, name in enumerate(config.get("layer_types") or []):
        fixed_name = LAYER_TYPES[index % 2]
        if name != fixed_name:
            found.append(_sentence(f"layer_types[{index}]", name, fixed_name))
            break  # one layer shows it
    return found


def _sentence(key: str, value: Any, fixed: Any) -> str:
    return (
        f"vLLM computes with {key} {fixed}, whatever config.json says, and this model has {value}: "
        "serve it with transformers, or expect other numbers."
    )
