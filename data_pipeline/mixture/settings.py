"""The settings of a mix as plain values, and what differs between two of them, in words.

Decisions
    Paths are no settings: a change of what the files hold is for `origin.fingerprint` to notice.
    So the setting of a hook is the name of its function, wherever its file is and whatever it does.
    Sources and guard domains are compared by name, so moving one in the list changes nothing.
    Factors of phases on the learning rate decide no row: an edit of them is one of the rate
    (cpt/job/seam.py), and not of the mix.
    A setting that one side does not have, because another version wrote it, counts as its default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_pipeline.config.decontamination_config import DecontaminationConfig
from data_pipeline.config.document_hook import split_hook
from data_pipeline.config.mix_config import GuardDomain, MixConfig
from data_pipeline.config.schedule_config import SchedulePhase
from data_pipeline.config.source_config import SourceConfig

Settings = dict[str, Any]

_SHARE_TOLERANCE = 1e-12


def mix_settings(mix: MixConfig) -> Settings:
    """Return a mix as JSON values, without paths and its name; sources and domains by name."""
    settings: Settings = json.loads(json.dumps(dataclasses.asdict(mix)))
    del settings["name"]
    if not settings["stages"]:
        del settings["stages"]  # so that the hash of a mix without them stays what it was
    del settings["decontamination"]
    settings |= _decontamination(mix)
    for source in settings["sources"]:
        del source["path"]
        if source["epochs"] is None:
            del source["epochs"]  # so that the hash of a mix without them stays what it was
        if source["hook"] is not None:
            _, source["hook"], _ = split_hook(source["hook"])
    domains = settings.pop("guard")["domains"]
    for domain in domains:
        if not domain["served_by"]:
            del domain["served_by"]  # so that the hash of a mix without it stays what it was
        del domain["normalise"]  # the source of the domain's files has it
    settings["sources"] = {source.pop("name"): source for source in settings["sources"]}
    settings["guard"] = {domain.pop("name"): domain for domain in domains}
    for phase in settings["schedule"]:
        del phase["lr_factor"], phase["to_lr_factor"]  # they are of the rate and of no row
        if not phase["max_epochs"]:
            del phase["max_epochs"]  # so that the hash of a mix without them stays what it was
    if not settings["schedule"]:
        del settings["schedule"]  # likewise
    return settings


def describe_rates(old: MixConfig, new: MixConfig) -> list[str]:
    """Return one line for each phase of both mixes with another factor on the learning rate."""
    before = {phase.name: phase for phase in old.schedule}
    lines: list[str] = []
    for phase in new.schedule:
        if phase.name not in before:
            continue
        for key in ("lr_factor", "to_lr_factor"):
            values = (getattr(before[phase.name], key), getattr(phase, key))
            lines += _describe_change(f"schedule[{phase.name}].{key}", *values)
    return lines


def _decontamination(mix: MixConfig) -> Settings:
    """Return the tokens under their older name, and of the other rules those that somebody set.

    So the hash of a mix without the section stays what it was.
    """
    rules = mix.decontamination_rules
    found: Settings = {"decontaminate_tokens": rules.tokens}
    for key, default in _defaults(DecontaminationConfig).items():
        if key != "tokens" and getattr(rules, key) != default:
            found[f"decontamination.{key}"] = getattr(rules, key)
    return found


def describe_changes(old: Settings, new: Settings) -> list[str]:
    """Return one line per setting that differs, then one per language share that moves."""
    lines: list[str] = []
    for key, default in _defaults(MixConfig).items():
        if key in ("sources", "guard", "name", "schedule", "decontamination"):
            continue
        lines += _describe_change(key, old.get(key, default), new.get(key, default))
    for key, default in _defaults(DecontaminationConfig).items():
        name = f"decontamination.{key}"
        lines += _describe_change(name, old.get(name, default), new.get(name, default))
    for key, kind in (("sources", SourceConfig), ("guard", GuardDomain)):
        lines += _describe_named(key, old.get(key, {}), new.get(key, {}), _defaults(kind))
    lines += _describe_schedule(old.get("schedule", []), new.get("schedule", []))
    old_shares = language_shares(old)
    new_shares = language_shares(new)
    for language in sorted(old_shares | new_shares):
        old_share = old_shares.get(language, 0.0)
        new_share = new_shares.get(language, 0.0)
        change = new_share - old_share
        if abs(change) > _SHARE_TOLERANCE:
            lines.append(
                f"share of {language}: {old_share:.2%} -> {new_share:.2%} of the tokens "
                f"({100 * change:+.2f} points)"
            )
    return lines


def language_shares(settings: Settings) -> dict[str, float]:
    """Return the sum of the weights of each language."""
    shares: dict[str, float] = {}
    for source in settings.get("sources", {}).values():
        shares[source["language"]] = shares.get(source["language"], 0.0) + source["weight"]
    return shares


def union_of_names(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the names of both sides: those of `old` in their order, then those only in `new`."""
    return list(dict.fromkeys([*old, *new]))


def _describe_named(
    kind: str, old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[str]:
    """Yield the changes of things that have names: sources, guard domains."""
    for name in union_of_names(old, new):
        if name not in new:
            yield f"{kind}[{name}]: removed{_describe_weight(old[name], 'was ')}"
            continue
        if name not in old:
            yield f"{kind}[{name}]: added{_describe_weight(new[name], '')}"
            continue
        for key in union_of_names(old[name], new[name]):
            default = defaults.get(key)
            yield from _describe_change(
                f"{kind}[{name}].{key}", old[name].get(key, default), new[name].get(key, default)
            )


def _describe_schedule(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Yield the changes of phases, by name, and of their order."""
    old_phases = {}
    for phase in old:
        old_phases[phase["name"]] = phase
    new_phases = {}
    for phase in new:
        new_phases[phase["name"]] = phase
    yield from _describe_named("schedule", old_phases, new_phases, _defaults(SchedulePhase))
    if old_phases.keys() == new_phases.keys() and list(old_phases) != list(new_phases):
        yield f"order of schedule: {', '.join(old_phases)} -> {', '.join(new_phases)}"


def _describe_change(key: str, old: Any, new: Any) -> Iterator[str]:
    if old != new:
        yield f"{key}: {_show(old)} -> {_show(new)}"


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """Return the default of each field of a dataclass as a JSON value; None if it has none."""
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = None
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        defaults[field.name] = list(value) if isinstance(value, tuple) else value
    return defaults


def _describe_weight(source: Mapping[str, Any], prefix: str) -> str:
    if "weight" not in source:
        return ""
    return f" ({prefix}weight {source['weight']:g}, language {source['language']})"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value)
