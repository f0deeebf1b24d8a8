"""openai-harmony: conversations, texts and stop tokens of an export's tokenizer are OpenAI's."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from transformers import AutoTokenizer

from bench.oracle.expected import TEXTS
from tests.support.conversations import random_record
from tests.support.harmony_oracle import as_seen, harmony_encoding, oracle_messages, oracle_tokens

NUM_RECORDS = 200


def main(folder: Path) -> str:
    """Return what was compared.

    Raises:
        AssertionError: something differs.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "bf16"))
    encoding = harmony_encoding()
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == encoding.encode(text, allowed_special="all"), text
    for seed in range(NUM_RECORDS):
        made = random_record(random.Random(seed), more=True)
        # a template cannot tell a control token that somebody wrote from one of the format
        record = json.loads(json.dumps(made).replace("<|", "<"))
        found = tokenizer.apply_chat_template(
            record["messages"],
            tools=record.get("tools"),
            reasoning_effort=record.get("reasoning_effort", "medium"),
            current_date=record.get("current_date", "2025-08-05"),
            return_dict=True,
        )["input_ids"]
        assert found == oracle_tokens(as_seen(oracle_messages(record))), f"seed {seed}"
    settings = json.loads((folder / "bf16" / "generation_config.json").read_text("utf-8"))
    stops = set(settings["eos_token_id"])
    assert stops >= set(encoding.stop_tokens_for_assistant_actions()), stops
    return f"{NUM_RECORDS} conversations, {len(TEXTS)} texts and the stop tokens are equal"


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
