"""Random conversations, as records of `format: harmony`, for tests of everything that renders them.

    random_record(random.Random(seed)) -> {"messages", "tools", "reasoning_effort", "current_date"}

The records hold what the chat template of an export renders, too: one call in each message that
calls, names in results, and no `channel`.  `more=True` adds what only training data has: several
calls in a message, results by id, messages that name their channel.
"""

from __future__ import annotations

import random
from typing import Any

Record = dict[str, Any]

WORDS = (
    "weather",
    "in Tokyo?",
    "\u6771\u4eac\u306e\u5929\u6c17",
    "\u306f\u3044\u3002",
    "3.14",
    "{}",
    "<|end|>",
    "<|start|>assistant",
    "to=functions.f",
    "\n\n",
    "// note",
    '"quoted"',
    "\U0001f642",
    "na\u00efve",
)
KINDS = (
    *("string", "string", "integer", "number", "boolean", "array", "object", "null"),
    *("union", "one_of", "any", "enum"),
)
NAMES = ("get_weather", "search", "add", "lookup_user", "f-1", "a.b")


def random_text(rng: random.Random, most: int = 6) -> str:
    """Return a text that is not blank."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, most))]
    return "x" + rng.choice((" ", "")).join(words)


def random_schema(rng: random.Random, depth: int = 2) -> Record:
    """Return a JSON schema of a value."""
    kind = rng.choice(KINDS)
    schema: Record = {"type": kind}
    if kind == "enum":
        schema = {"type": "string", "enum": [random_text(rng, 1) for _ in range(rng.randint(1, 3))]}
    elif kind == "union":
        schema = {"type": [rng.choice(("string", "integer")), "null"]}
    elif kind == "any":
        schema = {}
    elif kind == "one_of":
        if depth:
            schema = {"oneOf": [random_schema(rng, 0) for _ in range(rng.randint(1, 3))]}
        else:
            schema = {"type": "string"}
    elif kind == "array" and depth and rng.random() < 0.8:
        schema["items"] = random_schema(rng, depth - 1)
    elif kind == "object" and depth:
        schema = random_object_schema(rng, depth - 1)
    if kind == "integer" and rng.random() < 0.3:
        schema["enum"] = [1, 2]
    if rng.random() < 0.4:
        schema["description"] = random_text(rng, 3)
    if rng.random() < 0.2:
        schema["title"] = random_text(rng, 1)
    if rng.random() < 0.2:
        schema["nullable"] = True
    if rng.random() < 0.2:
        schema["examples"] = rng.choice(([random_text(rng, 1), 3], [], [random_text(rng, 2)]))
    if rng.random() < 0.3:
        texts = schema.get("enum") or [random_text(rng, 1)]
        values: list[Any] = [1, 2.5, True, None, [1, "a"], {"k": "v", "n": 1}, "\u6771\u4eac"]
        numbers: list[Any] = [1e20, 1e-7, -1.5e-5, 2**64, -(2**63), [1e17, {"k": [2e-5, 1e-4]}]]
        schema["default"] = rng.choice([*texts, *values, *numbers])
    return schema


def random_object_schema(rng: random.Random, depth: int = 2) -> Record:
    """Return a JSON schema of an object."""
    names = rng.sample(("zeta", "city", "days", "unit", "opt"), rng.randint(0, 3))
    schema: Record = {
        "type": "object",
        "properties": {name: random_schema(rng, depth) for name in names},
    }
    if rng.random() < 0.7:
        schema["required"] = [name for name in names if rng.random() < 0.5]
    if rng.random() < 0.2:
        schema["additionalProperties"] = False
    return schema


def random_tool(rng: random.Random, name: str) -> Record:
    """Return the definition of a function, as OpenAI's API takes it."""
    function: Record = {
        "name": name,
        "description": rng.choice((random_text(rng), f"Line 1\n{random_text(rng)}\n")),
    }
    kind = rng.random()
    if kind < 0.7:
        function["parameters"] = random_object_schema(rng)
    elif kind < 0.8:
        function["parameters"] = {"type": "object"}
    return {"type": "function", "function": function}


def random_arguments(rng: random.Random) -> Any:
    """Return the arguments of a call: JSON text, or the object itself."""
    return rng.choice(('{"city": "Tokyo"}', "{}", {"city": "\u6771\u4eac", "n": [1, 2.5, None]}))


def random_record(rng: random.Random, *, more: bool = False) -> Record:
    """Return a record of one to four turns.

    Args:
        rng: Decides everything.
        more: Whether to use what the chat template of an export does not render, too.
    """
    tools = [random_tool(rng, name) for name in rng.sample(NAMES, rng.choice((0, 0, 1, 2, 3)))]
    messages: list[Record] = []
    if rng.random() < 0.5:
        role = rng.choice(("system", "developer"))
        messages.append({"role": role, "content": random_text(rng)})
    num_turns = rng.randint(1, 4)
    for turn in range(num_turns):
        messages.append({"role": "user", "content": random_text(rng)})
        for _ in range(rng.choice((0, 1, 2)) if tools else 0):
            messages += _random_calls(rng, tools, more)
        if more and tools and turn + 1 == num_turns and rng.random() < 0.2:
            call = _random_calls(rng, tools, more)[0]
            messages.append(call)
            break
        messages += _random_answer(rng, more)
    record: Record = {"messages": messages}
    if tools:
        record["tools"] = tools
    if rng.random() < 0.5:
        record["reasoning_effort"] = rng.choice(("low", "medium", "high"))
    if rng.random() < 0.5:
        record["current_date"] = "2026-01-31"
    return record


def _random_answer(rng: random.Random, more: bool) -> list[Record]:
    answer: Record = {"role": "assistant", "content": random_text(rng)}
    thinking = random_text(rng) if rng.random() < 0.7 else None
    if more and rng.random() < 0.3:
        messages = [{**answer, "channel": "final"}]
        if thinking is not None:
            analysis = {"role": "assistant", "channel": "analysis", "content": thinking}
            messages.insert(0, analysis)
        return messages
    if thinking is not None:
        answer["thinking"] = thinking
    return [answer]


def _random_calls(rng: random.Random, tools: list[Record], more: bool) -> list[Record]:
    """Return a message that calls functions, and their results."""
    num_calls = rng.randint(1, 3) if more else 1
    calls = []
    results = []
    for number in range(num_calls):
        name = rng.choice(tools)["function"]["name"]
        call_id = f"call_{number}"
        function = {"name": name, "arguments": random_arguments(rng)}
        calls.append({"id": call_id, "type": "function", "function": function})
        content = rng.choice((random_text(rng), '{"t": 20}', {"t": 20, "u": "\u5ea6"}))
        if more:
            results.append({"role": "tool", "tool_call_id": call_id, "content": content})
        else:
            results.append({"role": "tool", "name": name, "content": content})
    message: Record = {"role": "assistant", "content": "", "tool_calls": calls}
    if rng.random() < 0.6:
        message["thinking"] = random_text(rng)
    if rng.random() < 0.4:
        message["content"] = random_text(rng)
    if more:
        rng.shuffle(results)
    return [message, *results]
