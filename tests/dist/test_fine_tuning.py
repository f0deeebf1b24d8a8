"""A run on conversations, from the files that users write: its first loss is that of TRL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from transformers import AutoTokenizer, GptOssForCausalLM

from cpt.export.tokenizer import save_tokenizer
from cpt.model.configuration import load_config
from cpt.telemetry.metrics import read_events
from data_pipeline.text.harmony import DEFAULT_DATE
from tests.support.launcher import ROOT, free_port, rank_environment
from tests.support.launcher import start as start_ranks
from tests.support.records import write_jsonl

pytestmark = [pytest.mark.dist, pytest.mark.slow]
SEQ_LEN = 512
QUESTION = "Is the sky blue?"
ANSWER = "Yes, it is."
CONVERSATIONS = [
    [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "thinking": "It scatters.", "content": ANSWER},
    ],
    [
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And three?"},
        {"role": "assistant", "thinking": "4 + 3.", "content": "Seven."},
    ],
    [
        {"role": "system", "content": "Answer in Japanese."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "\u3053\u3093\u306b\u3061\u306f"},
    ],
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a run that was fine-tuned from it on all conversations in one row."""
    folder = tmp_path_factory.mktemp("tuning")
    torch.manual_seed(5)
    config = load_config(None, "tiny")
    GptOssForCausalLM(config).float().save_pretrained(str(folder / "model"))
    save_tokenizer(folder / "model", 4096)
    write_jsonl(folder / "chat.jsonl", [{"messages": messages} for messages in CONVERSATIONS])
    source: dict[str, Any] = {
        "name": "chat",
        "language": "en",
        "domain": "chat",
        "path": "chat.jsonl",
    }
    source |= {"format": "harmony", "loss": "assistant", "weight": 1.0}
    mix = {"seq_len": SEQ_LEN, "seed": 1, "near_duplicates": 0, "sources": [source]}
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    run = {
        "model": {"path": "model"},
        "data": {"mix": "mix.yaml"},
        "train": {
            "seq_len": SEQ_LEN,
            "global_batch_size": 1,
            "total_steps": 1,
            "lr": 3e-3,
            "schedule": "constant",
            "weight_decay": 0.0,
            "dtype": "fp32",
        },
        "guard": {"enabled": False},
        "checkpoint": {"interval_steps": 0},
        "telemetry": {"export_at_end": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    arguments = ["--ds_config", "ds.json", "--config", "run.yaml", "--run_dir", "tuned"]
    environments = [rank_environment(0, 1, free_port())]
    codes, outputs = start_ranks(ROOT / "cpt" / "run.py", arguments, environments, folder).wait()
    assert codes == [0], outputs[0]
    return folder


def loss_of_trl(folder: Path) -> tuple[float, int]:
    """Return the loss of TRL's first batch, which holds all conversations, and its learned tokens.

    TRL takes the mask from the chat template that our exports have, whose generation tags are on
    what the model generates. Its own template would also learn the first `<|start|>assistant`, and
    the `<|end|>` of earlier answers.
    """
    from trl import SFTConfig, SFTTrainer

    arguments = {"current_date": DEFAULT_DATE.isoformat(), "reasoning_effort": "medium"}
    records: list[dict[str, Any]] = []
    for messages in CONVERSATIONS:
        told = [{"thinking": None, **message} for message in messages]
        records.append({"messages": told, "chat_template_kwargs": arguments})
    model = GptOssForCausalLM.from_pretrained(folder / "model", attn_implementation="eager")
    model.set_experts_implementation("eager")
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        assistant_only_loss=True,
        packing=False,
        max_length=None,
        per_device_train_batch_size=len(CONVERSATIONS),
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        router_aux_loss_coef=0.0,  # the released config has 0.9, which the run does not add
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    num_learned = int((batch["labels"] != -100).sum())
    loss = trainer.compute_loss(trainer.model, batch)
    return loss.item(), num_learned


def test_first_loss_is_that_of_trl_on_the_same_conversations(workplace: Path) -> None:
    events = read_events(workplace / "tuned" / "metrics.jsonl")
    first = next(event for event in events if event["event"] == "step")
    expected, num_learned = loss_of_trl(workplace)
    assert first["tokens"] == num_learned
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
