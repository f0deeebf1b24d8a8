"""Fields of a record: which ones a source reads, and the value of each, also inside other fields.

Decisions
    Names lead into other fields as `text.record_keys.find_field` has it.
    A condition on a field that is absent, or holds another kind of value, is not met. Null counts
    as absent, and so does an empty text where a condition asks whether the field is there.
    Numbers are compared as numbers, and other values as texts: 3, 3.0 and "3" are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from data_pipeline.config.record_filters import FilterRule, plain_value
from data_pipeline.config.source_config import CLUSTER_PLACES, SourceConfig, template_fields
from data_pipeline.text.record_keys import ABSENT, find_field


def text_fields(source: SourceConfig) -> tuple[str, ...]:
    """Return the names of the fields that the text is made of, which a record must have."""
    if source.template is not None:
        return template_fields(source.template)
    return (source.text_field,)


def value_fields(source: SourceConfig) -> tuple[str, ...]:
    """Return the names of the other fields that are read: of filters, of the cluster, and kept."""
    names = [*source.keep, *(rule.field for rule in source.filters)]
    if source.cluster_by is not None and source.cluster_by not in CLUSTER_PLACES:
        names.append(source.cluster_by)
    read = text_fields(source)
    return tuple(name for name in dict.fromkeys(names) if name not in read)


def why_filtered(source: SourceConfig, record: Mapping[str, Any]) -> str | None:
    """Return the first condition of a source that a record does not meet, or None."""
    for rule in source.filters:
        value = find_field(record, rule.field)
        problem = _problem(rule, None if value is ABSENT else value)
        if problem is not None:
            return f"{rule.field} {problem}"
    return None


def _problem(rule: FilterRule, value: Any) -> str | None:
    """Return how a value, None if there is none, breaks a rule."""
    if rule.present is False:
        return None if value is None or value == "" else "is present"
    if value is None or (rule.present and value == ""):
        return "is absent"
    if rule.min is not None or rule.max is not None:
        problem = _number_problem(rule, value)
        if problem is not None:
            return problem
    if rule.one_of and plain_value(value) not in map(plain_value, rule.one_of):
        return f"is not one of {rule.accepted}"
    if rule.not_one_of and plain_value(value) in map(plain_value, rule.not_one_of):
        return f"is one of {rule.refused}"
    return None


def _number_problem(rule: FilterRule, value: Any) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "is not a number"
    if isinstance(value, float) and math.isnan(value):
        return "is not a number"
    if rule.min is not None and value < rule.min:
        return f"< {rule.min:g}"
    if rule.max is not None and value > rule.max:
        return f"> {rule.max:g}"
    return None
