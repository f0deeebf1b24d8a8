"""The DeepSpeed that this room was written for: its version, and the private code it relies on.

Decisions
    Another version is refused, because its inside has not been read.
    The tested version may still be patched on a machine, so every private function that is replaced
    or relied on is compared with the source that was read, by a hash. Only those that a
    configuration uses are compared.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import deepspeed
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups, mixed_precision_linkage

from cpt.errors import ConfigError

TESTED_VERSIONS = ("0.19.8",)

Feature = Literal[
    "experts",
    "ZeRO-1 or 2",
    "ZeRO-3",
    "offloaded optimizer",
    "offloaded optimizer of ZeRO-1 or 2",
    "NVMe optimizer",
    "NVMe weights",
]
"""A part of this room that relies on private code of DeepSpeed."""


@dataclass(frozen=True, slots=True)
class PrivateCode:
    """A private function of DeepSpeed whose source has been read."""

    owner: type | ModuleType
    """The class or module that has it."""
    name: str
    """Its name there."""
    source_hash: str
    """The first 16 hexadecimal digits of the SHA-256 of its source."""

    def describe(self) -> str:
        """Return the full name for people."""
        return f"{self.owner.__name__}.{self.name}"


RELIED_ON: dict[Feature, tuple[PrivateCode, ...]] = {
    # cpt/deepspeed_adapter/groups.py and partition.py call these.
    "experts": (
        PrivateCode(groups, "_create_expert_and_data_parallel", "52f333e8eea25829"),
        PrivateCode(groups, "_get_expert_parallel_group", "84bd9f88060e3503"),
        PrivateCode(groups, "_get_expert_data_parallel_group", "5436fd39680df5fd"),
    ),
    # gradients.py shadows `scaled_global_norm`; shards.py reads `_hp_mapping`, which the next two
    # set; experts.py replaces the last.
    "ZeRO-1 or 2": (
        PrivateCode(DeepSpeedZeroOptimizer, "scaled_global_norm", "63c6a6fe100c4e49"),
        PrivateCode(DeepSpeedZeroOptimizer, "_link_all_hp_params", "e91c2f7e8f29ef11"),
        PrivateCode(mixed_precision_linkage, "_init_lp_to_hp_mapping", "a16320677bbbcee4"),
        PrivateCode(DeepSpeedZeroOptimizer, "_configure_moe_settings", "1266af584e83dfa1"),
    ),
    # gradients.py shadows `_get_norm_groups`; partition.py overrides the first method of Init and
    # calls the second; running_modules.py shortens the list that the hooks of the last two keep.
    "ZeRO-3": (
        PrivateCode(DeepSpeedZeroOptimizer_Stage3, "_get_norm_groups", "6a068faa3149b1f4"),
        PrivateCode(DeepSpeedZeroOptimizer_Stage3, "get_param_id", "a6dc96bd483c1400"),
        PrivateCode(Init, "_convert_to_zero_parameters", "df65a7124c1cdc9c"),
        PrivateCode(Init, "_convert_to_deepspeed_param", "77281d2526a148fb"),
        PrivateCode(DeepSpeedZeRoOffload, "_register_deepspeed_module", "05081f6e841fa219"),
        PrivateCode(DeepSpeedZeRoOffload, "pre_sub_module_forward_function", "62abffd323b9210b"),
    ),
    # offload.py replaces the first method. The second makes the buffer and the dictionary that
    # `place_gradients` uses; the next two write to them. gradient_places.py replaces the fourth,
    # the fifth and the sixth, in the order in which the last one calls them.
    "offloaded optimizer": (
        PrivateCode(
            DeepSpeedZeroOptimizer_Stage3, "initialize_optimizer_states", "e7929e87483515f8"
        ),
        PrivateCode(DeepSpeedZeroOptimizer_Stage3, "_setup_for_real_optimizer", "501df2275cc2960c"),
        PrivateCode(DeepSpeedZeroOptimizer_Stage3, "partition_grads", "93119b25314ec6d3"),
        PrivateCode(
            DeepSpeedZeroOptimizer_Stage3, "_offload_grad_partition_at_boundary", "0a84c049d8c77972"
        ),
        PrivateCode(DeepSpeedZeroOptimizer_Stage3, "unscale_and_clip_grads", "3f0d9e8e7861fd44"),
        PrivateCode(DeepSpeedZeroOptimizer_Stage3, "_release_sub_group", "8830be5fe99207f7"),
        PrivateCode(DeepSpeedZeroOptimizer_Stage3, "step", "c751b3209f83d3b9"),
    ),
    # gradient_places.py replaces the first five methods; the others call them.
    "offloaded optimizer of ZeRO-1 or 2": (
        PrivateCode(
            DeepSpeedZeroOptimizer, "_use_compact_grad_partition_buffer", "b4b53eb20083e540"
        ),
        PrivateCode(
            DeepSpeedZeroOptimizer, "_build_compact_grad_partition_buffer", "54c896878ee928ae"
        ),
        PrivateCode(DeepSpeedZeroOptimizer, "_add_to_grad_partition_buffer", "e52e5fd8099bcac7"),
        PrivateCode(DeepSpeedZeroOptimizer, "copy_grads_in_partition", "110f723937b99fb9"),
        PrivateCode(DeepSpeedZeroOptimizer, "unscale_and_clip_grads", "6bf2ce6f97eafcc2"),
        PrivateCode(
            DeepSpeedZeroOptimizer, "_get_compact_grad_partition_buffer", "56079ca1527810c5"
        ),
        PrivateCode(DeepSpeedZeroOptimizer, "setup_buckets", "82266aa4880f7d64"),
        PrivateCode(DeepSpeedZeroOptimizer, "step", "9520884fd916d178"),
    ),
    # offload.py replaces this method.
    "NVMe optimizer": (
        PrivateCode(DeepSpeedZeroOptimizer_Stage3, "_create_fp32_partitions", "2d22754c23f57f29"),
    ),
    # offload.py replaces this method.
    "NVMe weights": (
        PrivateCode(
            DeepSpeedZeroOptimizer_Stage3,
            "_create_param_groups_fp16_flat_cpu_memory",
            "fb59af0fe1f2ffcb",
        ),
    ),
}
"""The private functions that are called, replaced or relied on, by the feature that needs them."""


def check_version() -> None:
    """Refuse a DeepSpeed whose inside has not been read.

    Raises:
        ConfigError: another version is installed.
    """
    if deepspeed.__version__ not in TESTED_VERSIONS:
        raise ConfigError(
            f"deepspeed {deepspeed.__version__} is installed; expert parallelism and checkpoints "
            f"rely on the inside of {', '.join(TESTED_VERSIONS)}. Install that version "
            "(constraints.txt), or run the tests under tests/dist with yours and add it to "
            "TESTED_VERSIONS in cpt/deepspeed_adapter/version.py."
        )


def check_private_code(features: Iterable[Feature]) -> None:
    """Refuse a DeepSpeed whose private code is not what this room was written for.

    Raises:
        ConfigError: a function that one of the features needs is missing or has another source.
    """
    problems = []
    for feature in features:
        for code in RELIED_ON[feature]:
            found = source_hash(code.owner, code.name)
            if found != code.source_hash:
                problems.append(
                    f"deepspeed: the source of {code.describe()}, which {feature} relies on, has "
                    f"the hash {found}; the one that was read has {code.source_hash}."
                )
    if problems:
        advice = (
            f"Install the unmodified deepspeed {', '.join(TESTED_VERSIONS)} (constraints.txt), or "
            "compare the sources, run the tests under tests/dist, and record the hash in RELIED_ON "
            "of cpt/deepspeed_adapter/version.py."
        )
        raise ConfigError([*problems, advice])


def source_hash(owner: type | ModuleType, name: str) -> str:
    """Return the hash of a function's source, or "none" if there is no such function."""
    function = getattr(owner, name, None)
    if function is None:
        return "none"
    source = inspect.getsource(_undecorated(function))
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _undecorated(function: Any) -> Any:
    """Return the function inside DeepSpeed's `instrument_w_nvtx`, which keeps no `__wrapped__`."""
    return inspect.getclosurevars(function).nonlocals.get("func", function)
