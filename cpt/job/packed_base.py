"""What a run with `adapter.base: mxfp4` needs of its model, checked before weights are read."""

from __future__ import annotations

from pathlib import Path

from transformers import GptOssConfig

from cpt.config import RunYaml
from cpt.model.missing_model import is_checkpoint
from cpt.model.parameters import parameter_shapes
from cpt.model.weights import mxfp4
from cpt.model.weights.directory import DirectoryWeights
from cpt.model.weights.hf_layout import is_expert_matrix
from cpt.model.weights.packed_codes import CURE


def packed_base_problems(run: RunYaml, model: GptOssConfig) -> list[str]:
    """Return why the experts of a run's model cannot be kept in 4 bits, from names and sizes.

    Args:
        run: The run YAML; its models are located.
        model: The architecture.
    """
    if run.adapter.base != "mxfp4":
        return []
    problems = []
    for key in ("hidden_size", "intermediate_size"):
        size = int(getattr(model, key))
        if size % mxfp4.BLOCK:
            problems.append(
                f"adapter.base is mxfp4, but {key} of the model is {size}, and MXFP4 has blocks of "
                f"{mxfp4.BLOCK} weights. Give adapter.base: bf16."
            )
    if run.model.path is None:
        problems.append(
            f"adapter.base is mxfp4, but the weights of model.init: {run.model.init} are random "
            f"and have no MXFP4 codes. {CURE}"
        )
    paths = {"model.path": run.model.path, "guard.baseline_model": run.guard.baseline_model}
    for key, path in paths.items():
        if path is not None and is_checkpoint(path):
            problems.append(
                f"adapter.base is mxfp4, but {key} {path} is a checkpoint, whose experts were "
                f"trained in fp32. {CURE}"
            )
    return problems


def check_one_expert(path: Path, model: GptOssConfig) -> None:
    """Pack one expert of a directory; all of them are packed after the start.

    Raises:
        ConfigError: it has values that MXFP4 does not have, or the directory is not this model.
    """
    shapes = parameter_shapes(model)
    first = next(name for name, shape in shapes.items() if is_expert_matrix(name, shape))
    DirectoryWeights(path, shapes).codes(first, 0)
