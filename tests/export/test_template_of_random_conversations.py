"""The chat template renders random conversations as training and as openai-harmony do."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cpt.export.tokenizer import TEMPLATE
from cpt.offline.plain_tokenizer import plain_tokenizer
from data_pipeline.text.harmony_records import read_conversation
from data_pipeline.text.tokenizer import encoding
from tests.support.conversations import Record, random_record
from tests.support.harmony_oracle import as_seen, oracle_messages, oracle_prompt, oracle_tokens

NUM_RECORDS = 100
CHAT_TEMPLATE = TEMPLATE.read_text("utf-8")


def arguments_of(record: Record) -> dict[str, Any]:
    """Return what the template takes beside the messages; the defaults are those of training."""
    return {
        "tools": record.get("tools"),
        "reasoning_effort": record.get("reasoning_effort", "medium"),
        "current_date": record.get("current_date", "2025-08-05"),
    }


def rendered(record: Record, messages: list[Record], *, prompt: bool) -> str:
    found, _ = render_jinja_template(
        [messages],
        chat_template=CHAT_TEMPLATE,
        add_generation_prompt=prompt,
        **arguments_of(record),
    )
    return str(found[0])


@pytest.mark.parametrize("more", [False, True], ids=["as served", "as in training files"])
def test_template_renders_what_openai_harmony_renders(more: bool) -> None:
    for seed in range(NUM_RECORDS):
        record = random_record(random.Random(seed), more=more)
        tokens = oracle_tokens(as_seen(oracle_messages(record)))
        text = rendered(record, record["messages"], prompt=False)
        assert text == encoding().decode(tokens), f"seed {seed}"


def test_template_shows_the_prompt_of_every_turn_as_openai_harmony_does() -> None:
    for seed in range(NUM_RECORDS):
        record = random_record(random.Random(seed), more=True)
        messages = record["messages"]
        for stop in range(1, len(messages)):
            if messages[stop]["role"] != "assistant":
                continue
            history = messages[:stop]
            # an answer that ends the history has closed its turn: nothing of its analysis is left
            next_question = [*history, {"role": "user", "content": ""}]
            seen = as_seen(oracle_messages({**record, "messages": next_question}))[:-1]
            text = rendered(record, history, prompt=True)
            assert text == encoding().decode(oracle_prompt(seen)), f"seed {seed}, message {stop}"


def test_generation_tags_give_the_tokens_that_training_learns() -> None:
    """A control token in a text stays text in training; a template cannot tell it from a real one.

    So the texts hold none here.
    """
    tokenizer = plain_tokenizer(4096, CHAT_TEMPLATE)
    for seed in range(NUM_RECORDS):
        made = random_record(random.Random(seed), more=True)
        record = json.loads(json.dumps(made).replace("<|", "<"))
        conversation, reason = read_conversation(record)
        assert conversation is not None, reason
        found = tokenizer.apply_chat_template(
            record["messages"],
            return_dict=True,
            return_assistant_tokens_mask=True,
            **arguments_of(record),
        )
        assert found["input_ids"] == conversation.tokens().tolist(), f"seed {seed}"
        learned = conversation.learned().astype(int).tolist()
        assert found["assistant_masks"] == learned, f"seed {seed}"
