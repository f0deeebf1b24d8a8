"""The settings of a mix as plain values, and what differs between two of them, for people.

Decisions
    Paths are no settings: what the files hold is for `build.fingerprint` to notice.
    Sources and guard domains are compared by name, so that moving one in the list is no change of
    the others. A setting that one side does not have, because it was written by another version,
    counts as its default.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.config.mix_config import GuardDomain, MixConfig
from data_pipeline.config.source_config import SourceConfig

Settings = dict[str, Any]


def mix_settings(mix: MixConfig) -> Settings:
    """A mix as JSON values, without paths and name; sources and guard domains by name."""
    content = json.loads(json.dumps(dataclasses.asdict(mix)))
    del content["name"]
    for source in content["sources"]:
        del source["path"]
    content["sources"] = {source.pop("name"): source for source in content["sources"]}
    domains = content.pop("guard")["domains"]
    content["guard"] = {domain.pop("name"): domain for domain in domains}
    return content  # type: ignore[no-any-return]


def describe_changes(old: Settings, new: Settings) -> list[str]:
    """One line for each setting that differs, then the language shares that move."""
    lines = [
        f"{key}: {_show(old.get(key, default))} -> {_show(new.get(key, default))}"
        for key, default in _defaults(MixConfig).items()
        if key not in ("sources", "guard", "name")
        and old.get(key, default) != new.get(key, default)
    ]
    lines += _named(
        "sources", old.get("sources", {}), new.get("sources", {}), _defaults(SourceConfig)
    )
    lines += _named("guard", old.get("guard", {}), new.get("guard", {}), _defaults(GuardDomain))
    before, after = language_shares(old), language_shares(new)
    for language in sorted(before | after):
        was, now = before.get(language, 0.0), after.get(language, 0.0)
        if abs(was - now) > 1e-12:
            lines.append(
                f"share of {language}: {was:.2%} -> {now:.2%} of the tokens ({100 * (now - was):+.2f} points)"
            )
    return lines


def language_shares(settings: Settings) -> dict[str, float]:
    """Sum of the weights by language."""
    shares: dict[str, float] = {}
    for source in settings.get("sources", {}).values():
        shares[source["language"]] = shares.get(source["language"], 0.0) + source["weight"]
    return shares


def _named(
    kind: str, old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Iterator[str]:
    for name in [*old, *(name for name in new if name not in old)]:
        if name not in new:
            yield f"{kind}[{name}]: removed{_weight(old[name], 'was ')}"
        elif name not in old:
            yield f"{kind}[{name}]: added{_weight(new[name], '')}"
        else:
            for key in [*old[name], *(key for key in new[name] if key not in old[name])]:
                was, now = (
                    old[name].get(key, defaults.get(key)),
                    new[name].get(key, defaults.get(key)),
                )
                if was != now:
                    yield f"{kind}[{name}].{key}: {_show(was)} -> {_show(now)}"


def _defaults(cls: type[Any]) -> dict[str, Any]:
    """Default by field, as a JSON value; None for a field that has none."""
    values = {}
    for field in dataclasses.fields(cls):
        value = None if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        values[field.name] = list(value) if isinstance(value, tuple) else value
    return values


def _weight(source: Mapping[str, Any], prefix: str) -> str:
    return (
        f" ({prefix}weight {source['weight']:g}, language {source['language']})"
        if "weight" in source
        else ""
    )


def _show(value: Any) -> str:
    return (
        "none" if value is None else f"{value:g}" if isinstance(value, float) else json.dumps(value)
    )
