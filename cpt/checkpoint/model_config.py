"""The model's configuration as a checkpoint holds it, checked as that of any other directory."""

from __future__ import annotations

from transformers import GptOssConfig

from cpt.checkpoint.manifest import Manifest
from cpt.checkpoint.run_state import RunState
from cpt.errors import CheckpointError, ConfigError
from cpt.model.configuration import config_of_values


def model_config_of(manifest: Manifest) -> GptOssConfig:
    """Return the configuration of a checkpoint's model.

    A checkpoint may be of somebody else: what its manifest says about the model is held against
    the same rules as a config.json.

    Raises:
        CheckpointError: the manifest holds none, or one that is not sound or names code.
    """
    where = f"checkpoint of step {manifest.step}, state.model_config of its manifest"
    values = RunState.of(manifest).model_config
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: is no JSON object.")
    try:
        return config_of_values(values, where)
    except ConfigError as error:
        raise CheckpointError("\n".join(error.problems)) from error
