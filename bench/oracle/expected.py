"""What a reader of an export must compute: made by transformers 5 in fp32, from the export itself.

expected.safetensors   logits of each weight format, (tokens, vocabulary)
expected.json          ids of texts, and renderings of a conversation
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from bench.oracle.models import tokens
from cpt.offline.plain_model import load_export

TEXTS = (
    "Hello, world!  12345 tokens\n\n\tand a tab",
    "\u6771\u4eac\u306f\u65e5\u672c\u306e\u9996\u90fd\u3067\u3059\u3002\uff11\uff12\uff13",
    "na\u00efve caf\u00e9 \U0001f642 \u0938\u0902\u0938\u094d\u0915\u0943\u0924",
    "<|start|>user<|message|>Hi<|end|>",
)
CONVERSATION: tuple[dict[str, Any], ...] = (
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Weather in Tokyo?"},
    {
        "role": "assistant",
        "thinking": "I need the tool.",
        "content": "I look it up.",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": {"city": "Tokyo"}}}
        ],
    },
    {"role": "tool", "name": "weather", "content": {"sky": "\u6674\u308c"}},
    {"role": "assistant", "thinking": "So it is clear.", "content": "It is clear."},
)
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name"},
                    "days": {"type": ["integer", "null"], "default": 1},
                },
                "required": ["city"],
            },
        },
    },
)
DATE = "2026-01-31"


def write_expected(folder: Path, formats: tuple[str, ...]) -> None:
    """Write both files into the folder of the exports."""
    logits = {}
    for name in formats:
        logits[name] = logits_of(folder / name)
    save_file(logits, folder / "expected.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "fp32"))
    content = {
        "texts": TEXTS,
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "conversation": CONVERSATION,
        "tools": TOOLS,
        "date": DATE,
        "rendering": rendering(tokenizer),
        "tokens": tokens().tolist(),
    }
    (folder / "expected.json").write_text(json.dumps(content), encoding="utf-8")


def rendering(tokenizer: Any) -> list[int]:
    """Return the ids of the conversation by the chat template of a tokenizer."""
    found = tokenizer.apply_chat_template(
        list(CONVERSATION), tools=list(TOOLS), current_date=DATE, return_dict=True
    )
    return list(found["input_ids"])


@torch.no_grad()
def logits_of(export: Path) -> torch.Tensor:
    """Return (tokens, vocabulary) logits in fp32, by eager attention and experts."""
    model = load_export(export).float()
    model.config._attn_implementation = "eager"
    model.config._experts_implementation = "eager"
    return model(tokens()[None]).logits[0].contiguous()
