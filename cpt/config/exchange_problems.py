"""How ranks exchange experts' rows, heads and neighbors' keys: the sizes each way is refused with.

A start refuses with these sentences, and the search over layouts (cpt/planning/search.py) leaves
out the sizes that they name.
"""

from __future__ import annotations

from typing import Any

from cpt.config.sections import ModelSection
from cpt.config.window import window_tokens


def overlap_problem(wanted: ModelSection, model: Any, ep_size: int) -> str | None:
    """Return why `model.expert_overlap` does not work with `ep_size` ranks of experts, if so."""
    if wanted.expert_overlap == "none":
        return None
    if ep_size == 1:
        return (
            "model.expert_overlap=halves overlaps the exchange of experts' rows, but with one "
            "rank of experts (expert_parallel) nothing is exchanged. Use none."
        )
    experts = model.num_local_experts
    if experts // ep_size < 2:
        return (
            "model.expert_overlap=halves needs at least two experts on each rank, but "
            f"{experts} experts / expert_parallel.autoep_size {ep_size} is "
            f"{experts // ep_size}. Use none, or an autoep_size of at most {experts // 2}."
        )
    return None


def head_groups_problem(wanted: ModelSection, model: Any, sp_size: int) -> str | None:
    """Return why `model.ulysses_groups` does not work with `sp_size` ranks of a row, if so."""
    groups = wanted.ulysses_groups
    if groups <= 1:
        return None
    if sp_size == 1:
        return (
            f"model.ulysses_groups={groups} exchanges heads in groups, but with "
            "sequence_parallel_size 1 none are exchanged. Use 1."
        )
    heads = max(1, model.num_key_value_heads // sp_size)
    if heads % groups:
        return (
            f"model.ulysses_groups={groups} does not divide the {heads} key/value heads of a "
            f"rank ({model.num_key_value_heads} / sequence_parallel_size {sp_size}, at "
            "least 1). Use 1, or a divisor."
        )
    return None


def halo_problem(wanted: ModelSection, model: Any, sp_size: int, shortest: int) -> str | None:
    """Return why `model.window_exchange` does not work with `sp_size` ranks of a row, if so.

    Args:
        wanted: The section `model` of the run YAML.
        model: The model's GptOssConfig.
        sp_size: Ranks that share a row.
        shortest: Tokens of the shortest rows.
    """
    reach = window_tokens(model) - 1
    local_tokens = shortest // sp_size
    if wanted.window_exchange != "halo" or sp_size == 1:
        return None
    if not reach:
        return (
            "model.window_exchange=halo exchanges the edges of windows, but this model has no "
            f"window of two keys or more (sliding_window {model.sliding_window}). "
            "Use auto or ulysses."
        )
    if local_tokens >= reach:
        return None
    return (
        f"model.window_exchange=halo needs {reach} tokens on each rank, but train.seq_len "
        f"{shortest} / sequence_parallel_size {sp_size} is {local_tokens}. "
        "Use auto or ulysses."
    )
