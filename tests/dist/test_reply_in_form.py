"""A model that was fine-tuned on conversations answers in their form, and stops by itself.

A small model with random weights learns two answers by heart.  Its greedy replies must then be an
analysis, a final answer, and `<|return|>`, with nothing before, between or after them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GptOssConfig, GptOssForCausalLM

from cpt.checkpoint.reader import step_folder
from cpt.export.tokenizer import save_tokenizer
from cpt.offline.plain_model import load_checkpoint, load_export
from cpt.offline.sampling import generate
from cpt.training.sampling import Sampling
from data_pipeline.text.harmony import DEFAULT_DATE, RETURN, encode_prompt
from data_pipeline.text.harmony_reply import ReplyMessage, parse_reply
from data_pipeline.text.tokenizer import VOCAB_SIZE
from tests.support.launcher import ROOT, free_port, rank_environment
from tests.support.launcher import start as start_ranks
from tests.support.records import write_jsonl

pytestmark = [pytest.mark.dist, pytest.mark.slow]
SEQ_LEN = 512
STEPS = 60
REPLIES = {
    "Is the sky blue?": ("Look up.", "Yes, it is."),
    "Is snow warm?": ("Touch it.", "No, it is cold."),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a run that was fine-tuned from it."""
    folder = tmp_path_factory.mktemp("reply")
    torch.manual_seed(5)
    config = GptOssConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=128,
    )
    GptOssForCausalLM(config).float().save_pretrained(str(folder / "model"))
    save_tokenizer(folder / "model", config.max_position_embeddings)
    records = []
    for question, (analysis, final) in REPLIES.items():
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "thinking": analysis, "content": final},
        ]
        records.append({"messages": messages})
    write_jsonl(folder / "chat.jsonl", records)
    source: dict[str, Any] = {"name": "chat", "language": "en", "domain": "chat", "weight": 1.0}
    source |= {"path": "chat.jsonl", "format": "harmony", "loss": "assistant"}
    mix = {"seq_len": SEQ_LEN, "seed": 1, "near_duplicates": 0, "sources": [source]}
    train = {
        "seq_len": SEQ_LEN,
        "global_batch_size": 1,
        "total_steps": STEPS,
        "lr": 5e-3,
        "warmup_steps": 5,
        "weight_decay": 0.0,
        "dtype": "fp32",
    }
    run = {
        "model": {"path": "model"},
        "data": {"mix": "mix.yaml"},
        "train": train,
        "guard": {"enabled": False},
        "checkpoint": {"interval_steps": STEPS},
        "telemetry": {"export_at_end": False},
    }
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    arguments = ["--ds_config", "ds.json", "--config", "run.yaml", "--run_dir", "tuned"]
    environments = [rank_environment(0, 1, free_port())]
    codes, outputs = start_ranks(ROOT / "cpt" / "run.py", arguments, environments, folder).wait(
        1800
    )
    assert codes == [0], outputs[0]
    return folder


def reply_to(model: Any, question: str) -> list[int]:
    prompt = encode_prompt(question, developer=None, effort="medium", date=DEFAULT_DATE)
    return generate(model, prompt, Sampling(max_new_tokens=64, temperature=0.0))


def test_a_fine_tuned_model_thinks_answers_and_returns(workplace: Path) -> None:
    model = load_checkpoint(step_folder(workplace / "tuned", STEPS))
    for question, (analysis, final) in REPLIES.items():
        reply = reply_to(model, question)
        assert reply[-1] == RETURN and reply.count(RETURN) == 1
        assert parse_reply(reply) == [
            ReplyMessage(channel="analysis", recipient="", text=analysis),
            ReplyMessage(channel="final", recipient="", text=final),
        ]


def test_the_model_before_does_neither(workplace: Path) -> None:
    """Otherwise the replies above would show nothing."""
    reply = reply_to(load_export(workplace / "model"), next(iter(REPLIES)))
    assert RETURN not in reply and parse_reply(reply)[0].channel != "analysis"
