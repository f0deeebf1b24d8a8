"""ZeRO-3 partitions of a model whose values come later, and the size of a parameter without ZeRO.

Read in deepspeed 0.19.8: runtime/zero/partition_parameters.py, utils/groups.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime import zero
from deepspeed.utils import groups
from torch import nn

from cpt.deepspeed_adapter.experts import is_expert
from cpt.deepspeed_adapter.offload import on_host
from cpt.storage.allocation import allocate


class _EmptyInit(zero.Init):  # type: ignore[misc]
    """zero.Init for a model on the meta device whose values come later.

    The base class takes whole tensors and broadcasts them from the first rank. Here a parameter is
    allocated, partitioned and freed before the next one, nothing is sent, and experts are
    partitioned over their own group.
    """

    def _convert_to_zero_parameters(self, param_list: Any) -> None:
        for module in self.module.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                real: Any = allocate(parameter, self.local_device)
                if is_expert(real):
                    name_of_group = real.ds_zero_partition_group_name
                    group = groups._get_expert_data_parallel_group(name_of_group)
                    real.ds_zero_partition_process_group = group
                module.register_parameter(name, real)
                self._convert_to_deepspeed_param(real)
                real.partition()
                if self.remote_device == "cpu" and not self.pin_memory:
                    # The partition has no values yet, and pages that nobody has touched take no
                    # memory.
                    real.ds_tensor.data = torch.empty_like(real.ds_tensor)


def materialize_partitioned(
    model: nn.Module, engine_json: dict[str, Any], dtype: torch.dtype
) -> None:
    """Give every parameter of a meta model its uninitialized ZeRO-3 partition on this rank.

    All ranks must call this together.
    """
    _EmptyInit(module=model, config_dict_or_path=on_host(engine_json), dtype=dtype)


def full_local_numel(parameter: Any) -> int:
    """Return the number of elements that this rank would hold without ZeRO."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def full_local_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of the tensor that this rank would hold without ZeRO."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def gathered(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Make parameters whole inside the block, for reading only; all ranks must enter together."""
    with zero.GatheredParameters(parameters):
        yield
