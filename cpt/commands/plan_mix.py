"""What `cpt plan` shows of the mix of a run: its phases, and weights that follow from epochs.

The manifest of a build is enough for it. Tokens and epochs of phases take a walk over the rows of
the run: `python -m data_pipeline plan` and `--dry_run` have them.
"""

from __future__ import annotations

from cpt.config import DataSection
from cpt.errors import CptError
from data_pipeline.audit.phases import AuditedPhases, written_phases
from data_pipeline.build.found_builds import only_build
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.mixture.epochs import describe_weights, has_epochs, with_weights
from data_pipeline.store.manifest import BuildManifest, read_manifest


def describe_mix(settings: DataSection) -> str:
    """Return the phases of a run's mix and its weights; empty if it has neither.

    A plan of hardware needs no data, so a mix that cannot be read is passed over here, as a start
    would refuse it.

    Args:
        settings: The `data` section of the run YAML.
    """
    try:
        mix = load_mix(settings.mix, need_files=False)
    except CptError:
        return ""
    note = ""
    if has_epochs(mix):
        try:
            manifest = _manifest_of(settings, mix)
            mix = mix if manifest is None else with_weights(mix, manifest)
        except CptError as error:
            note = str(error)
    shown = AuditedPhases(weights=describe_weights(mix), tables=written_phases(mix), note=note)
    text = shown.describe()
    return f"mix {settings.mix}\n{text}" if text else ""


def _manifest_of(settings: DataSection, mix: MixConfig) -> BuildManifest | None:
    """Return the manifest of a mix's build; None if there is none.

    Raises:
        ConfigError: several may be it.
    """
    if settings.build_dir is not None:
        return read_manifest(settings.build_dir) if settings.build_dir.exists() else None
    found = only_build(mix, settings.mix)
    return None if found is None else read_manifest(found)
