"""Compare text that a model wrote (`kind: self_replay`) with the untouched model of the run.

Decisions
    The untouched model has to have written it, or the one that the run starts from, which are not
    always the same: a last phase after continual pretraining still replays what the release wrote.
    The contents of all weight files are hashed for it. A gate that is passed at every start leaves
    that to the opening of the data, and refuses alone what no file could have written.
"""

from __future__ import annotations

from cpt.checkpoint.starting_model import weight_files
from cpt.config import RunConfig
from cpt.errors import ConfigError
from cpt.guard.untouched_model import untouched_name, untouched_path
from cpt.model.missing_model import is_checkpoint
from data_pipeline.build.self_replay import check_base_model
from data_pipeline.dataset import BuiltData


def check_replay(config: RunConfig, data: BuiltData, *, reads_weights: bool = True) -> None:
    """Refuse replay that neither the untouched model of this run nor its first weights wrote.

    Args:
        config: The configuration, in which runs that are named as models are located.
        data: The build.
        reads_weights: Hash the weight files; otherwise only random weights and checkpoints are
            refused, which never are what `cpt replay` samples from.

    Raises:
        ConfigError: naming every such source; or the model has no weight files.
    """
    base_models = {source.name: source.base_model for source in data.manifest.sources}
    if not any(base_models.values()):
        return
    paths = [untouched_path(config)]
    if config.model.path not in paths:
        paths.append(config.model.path)
    if not reads_weights and any(path is not None and not is_checkpoint(path) for path in paths):
        return
    refusals = []
    for path in paths:
        files = [] if path is None else weight_files(path)
        refusal = check_base_model(base_models, files, untouched_name(config))
        if not refusal:
            return
        refusals.append(refusal)
    raise ConfigError(refusals[0])
