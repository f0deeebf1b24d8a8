"""Whether the guard files of a mix are cleaned as the training text is that they are compared with.

Decisions
    Copies and held-out text are looked for among texts as they are trained on, so a text that is
    cleaned in one place and not in the other is two texts: its copy would be trained on, and it
    would be measured in a form that the model never sees.
    The files' own steps are named, not taken from the sources: these may differ from one another,
    and another default would be another text under the builds and baselines that exist.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_pipeline.config.strict_yaml import KeyPath, Reader

RawSection = Mapping[str, Any]


def check_guard_cleaning(
    reader: Reader, domain: RawSection, path: KeyPath, sources: Mapping[str, RawSection]
) -> None:
    """Report guard files that do not say how they are cleaned, where text of their language is.

    Args:
        reader: Takes the problem.
        domain: A parsed domain that has a path.
        path: Its place in the file.
        sources: The parsed sources by name.
    """
    if domain.get("normalise") is not None or domain.get("format") == "harmony":
        return
    for name, source in sources.items():
        steps = source.get("normalise")
        is_trained = source.get("held_out_share") != 1
        if not (isinstance(steps, list) and steps and is_trained):
            continue
        if source.get("language") == domain.get("language"):
            listed = f"normalise: [{', '.join(map(str, steps))}]"
            reader.problem(
                (*path, "normalise"),
                f"is missing, but the source '{name}' of the same language has {listed}: a copy of "
                f"these files there would be another text, and be trained on. Write {listed} here, "
                "too; or normalise: [] to take the files as they stand, as builds of earlier "
                "versions did.",
            )
            return
