"""Functions that a conversation offers: definitions in JSON -> the text that gpt-oss was taught.

    {"name", "description", "parameters": JSON schema} -> TypeScript in the developer message

Source: openai-harmony 0.0.8, src/encoding.rs, `template_tools_section` and
    `json_schema_to_typescript`. Its oddities are kept, since the model has seen no other text: a
    schema of `{}` or of type null is `any`, an enum of numbers is no enum, the second line of a
    field's description stands without slashes, and an object that is described says so twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.text.record_keys import UnusableRecordError

FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
"""Names that a header can hold: no space and no mark of the format."""
NAMESPACE = "functions"
"""Namespace of all functions; a call is addressed to `functions.name`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """One function that the assistant may call."""

    name: str
    """Its name, without the namespace."""
    description: str
    """Text on what it does; may be empty."""
    parameters: Any = None
    """JSON schema of its arguments; None if it takes none."""


def tools_section(tools: Sequence[Tool]) -> str:
    """Return the part of the developer message that defines functions."""
    lines = ["# Tools", "", f"## {NAMESPACE}", "", f"namespace {NAMESPACE} {{", ""]
    for tool in tools:
        for line in _lines(tool.description):
            lines.append(f"// {line}")
        arguments = ""
        if tool.parameters is not None:
            arguments = f"_: {schema_type(tool.parameters)}"
        lines += [f"type {tool.name} = ({arguments}) => any;", ""]
    lines.append(f"}} // namespace {NAMESPACE}")
    return "\n".join(lines)


def _lines(text: str) -> Iterator[str]:
    """Yield lines as Rust's `str::lines` does: LF or CRLF ends one, and the last may lack it."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for line in lines:
        yield line.removesuffix("\r")


def schema_type(schema: Any, indent: str = "") -> str:
    """Return the TypeScript type of a JSON schema.

    Args:
        schema: The schema; what is no object gives `any`.
        indent: Blanks before the fields of an object.
    """
    if not isinstance(schema, dict):
        return "any"
    variants = schema.get("oneOf")
    if isinstance(variants, list):
        return "".join(_variant(variant, indent) for variant in variants)
    kind = schema.get("type")
    if isinstance(kind, list):
        names = []
        for name in kind:
            if isinstance(name, str):
                names.append("number" if name == "integer" else name)
        if names:
            return " | ".join(names)
    if kind == "object":
        return _object_type(schema, indent)
    if kind == "string":
        return " | ".join(_choices(schema)) or "string"
    if kind in ("number", "integer"):
        return "number"
    if kind == "boolean":
        return "boolean"
    if kind == "array":
        if "items" not in schema:
            return "Array<any>"
        return f"{schema_type(schema['items'], indent)}[]"
    return "any"


def _variant(variant: Any, indent: str) -> str:
    """Return one choice of a `oneOf` that stands within a type."""
    comments = []
    description = _description_of(variant)
    if description is not None:
        comments.append(description)
    if isinstance(variant, dict) and "default" in variant:
        # a text is quoted here even if it is one of an enum, unlike the default of a field
        comments.append(f"default: {_quoted(variant['default'], variant, always=True)}")
    return f"\n{_choice_line(variant, comments, indent)}"


def _choice_line(variant: Any, comments: Sequence[str], indent: str) -> str:
    """Return the line of one choice of a `oneOf`."""
    trailing = f" // {' '.join(comments)}" if comments else ""
    return f"{indent} | {_or_null(variant, f'{indent}   ')}{trailing}"


def _or_null(schema: Any, indent: str) -> str:
    found = schema_type(schema, indent)
    if isinstance(schema, dict) and schema.get("nullable") is True and "null" not in found:
        return f"{found} | null"
    return found


def _choices(schema: dict[str, Any]) -> list[str]:
    """Return the texts of an enum, in quotes that nothing escapes."""
    values = schema.get("enum")
    if not isinstance(values, list):
        return []
    return [f'"{value}"' for value in values if isinstance(value, str)]


def _object_type(schema: dict[str, Any], indent: str) -> str:
    lines = []
    if isinstance(schema.get("description"), str):
        lines.append(f"{indent}// {schema['description']}")
    lines.append("{")
    fields = schema.get("properties")
    required = schema.get("required")
    if isinstance(fields, dict):
        for name, field in fields.items():
            is_required = isinstance(required, list) and name in required
            mark = "" if is_required else "?"
            lines += _field(f"{indent}{name}{mark}", field, indent)
    lines.append(f"{indent}}}")
    return "\n".join(lines)


def _field(name: str, field: Any, indent: str) -> list[str]:
    """Return the lines of one field; `name` comes with its indent and its question mark."""
    if not isinstance(field, dict):
        return [f"{name}: any,"]
    lines = []
    if isinstance(field.get("title"), str):
        lines += [f"{indent}// {field['title']}", f"{indent}//"]
    description = field.get("description")
    if "oneOf" not in field and isinstance(description, str):
        lines.append(f"{indent}// {description}")
    lines += _examples(field, indent)
    if isinstance(field.get("oneOf"), list):
        return lines + _choice_field(name, field, indent)
    end = ","
    if "default" in field and "oneOf" not in field:
        end = f", // default: {_quoted(field['default'], field)}"
    lines.append(f"{name}: {_or_null(field, f'{indent}    ')}{end}")
    return lines


def _examples(field: dict[str, Any], indent: str) -> list[str]:
    examples = field.get("examples")
    if not isinstance(examples, list) or not examples:
        return []
    lines = [f"{indent}// Examples:"]
    for example in examples:
        if isinstance(example, str):
            lines.append(f'{indent}// - "{example}"')
    return lines


def _choice_field(name: str, field: dict[str, Any], indent: str) -> list[str]:
    """Return the lines of a field whose schema is a `oneOf`."""
    variants = field["oneOf"]
    description = field.get("description")
    first = _description_of(variants[0]) if variants else None
    is_above = isinstance(description, str) and description != first
    lines = []
    if is_above:
        lines.append(f"{indent}// {description}")
    if "default" in field:
        lines.append(f"{indent}// default: {_quoted(field['default'], field)}")
    lines.append(f"{name}:")
    for number, variant in enumerate(variants):
        comments = []
        own = _description_of(variant)
        if own is not None and own != description and not (number == 0 and is_above):
            comments.append(own)
        if isinstance(variant, dict) and "default" in variant:
            comments.append(f"default: {_quoted(variant['default'], variant)}")
        lines.append(_choice_line(variant, comments, indent))
    lines.append(f"{indent},")
    return lines


def _description_of(schema: Any) -> str | None:
    if isinstance(schema, dict) and isinstance(schema.get("description"), str):
        return str(schema["description"])
    return None


def _quoted(default: Any, schema: dict[str, Any], *, always: bool = False) -> str:
    """Return a default value as a comment shows it: a text in quotes, unless it is of an enum."""
    if isinstance(default, str):
        is_of_enum = isinstance(schema.get("enum"), list) and bool(schema["enum"])
        if not is_of_enum:
            return f'"{default}"'
        if not always:
            return default
    return _json_text(default)


def _json_text(value: Any) -> str:
    """Return JSON without blanks, with numbers as Rust's serde_json writes them."""
    if isinstance(value, list):
        return f"[{','.join(_json_text(one) for one in value)}]"
    if isinstance(value, dict):
        members = []
        for key, one in value.items():
            members.append(f"{json.dumps(key, ensure_ascii=False)}:{_json_text(one)}")
        return f"{{{','.join(members)}}}"
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        try:
            value = float(value)  # as it is read there
        except OverflowError:
            raise UnusableRecordError("default of a tool's field that is out of range") from None
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, float):
        return text
    if text.endswith("e-05"):  # 1.5e-05 is 0.000015, and smaller ones have an exponent
        sign = "-" if value < 0 else ""
        digits = text.removesuffix("e-05").removeprefix("-").replace(".", "")
        return f"{sign}0.0000{digits}"
    return re.sub(r"e\+?(-?)0*", r"e\1", text)  # 1e+20 is 1e20
