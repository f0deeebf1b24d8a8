"""What a person should know of the guard at the start of a run that is not refused.

Every function is pure; `cpt.job.gate` logs what they return.
"""

from __future__ import annotations

from cpt.config import GuardSection
from cpt.guard.replay_share import main_language_of
from cpt.guard.requirements import acts
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.store.manifest import BuildManifest
from data_pipeline.store.provenance import unjoined_turns


def guard_warnings(
    settings: GuardSection, mix: MixConfig, manifest: BuildManifest | None
) -> list[str]:
    """Return a sentence or more for everything that a run should be warned of.

    Args:
        settings: The run's guard section.
        mix: The data mix, with its weights.
        manifest: BuildManifest of its build; None if there is none yet.
    """
    if not settings.enabled:
        return []
    warnings = []
    unserved = unserved_domains(settings, mix)
    if unserved:
        warnings.append(
            f"guard domains {', '.join(unserved)}: the mix trains on none of their sources, and "
            "they name no others in served_by, so no replay can help them. If they lose, the guard "
            "can only lower the learning rate and pause the run. Name sources in served_by of the "
            "domain, give its sources a weight, or let the guard only tell: guard.policy: warn."
        )
    measured = {name for domain in mix.guard_domains() for name in domain.sources}
    unjoined = [] if manifest is None else unjoined_turns(manifest)
    loose = [name for name in unjoined if name in measured]
    if loose:
        warnings.append(
            f"sources {', '.join(loose)}: their held-out documents are turns of conversations, and "
            "the build, which an earlier version made, does not tell which belong together. The "
            "guard counts each turn as a document of its own, so it is surer than it should be. A "
            "run that has begun goes on so. For a new one, build the mix anew (python -m "
            "data_pipeline build MIX --out OTHER, and data.build_dir)."
        )
    return warnings


def unserved_domains(settings: GuardSection, mix: MixConfig) -> list[str]:
    """Return the domains of held-out text for which no lever of their own is left.

    Text in the main language is none of them: the whole run trains on it. Nor is any if the guard
    moves the weight of the divergence, which acts on the whole model.

    Args:
        settings: The run's guard section.
        mix: The data mix, with its weights.
    """
    if not acts(settings) or settings.kl_lever != "off":
        return []
    main_language = main_language_of(mix)
    givers = {source.name for source in mix.sources if source.language == main_language}
    serving = mix.serving_sources()
    names = []
    for domain in mix.guard_domains():
        replayed = set(serving[domain.name]) - givers
        if domain.language != main_language and not replayed:
            names.append(domain.name)
    return names
