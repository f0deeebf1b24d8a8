"""Text that the base model wrote follows from the seed, and no other model may replay it."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import GptOssConfig, GptOssForCausalLM

from cpt.cli import main
from cpt.errors import ConfigError, DataError
from cpt.job.replay_check import check_replay
from cpt.offline.rank_options import RankOptions
from cpt.offline.replies import prompts_of_rank
from cpt.training.sampling import Sampling
from data_pipeline.build.build import build
from data_pipeline.build.self_replay import SIDECAR, weights_hash, write_sidecar
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from data_pipeline.text.harmony import CHANNEL, END, MESSAGE, RETURN, START
from data_pipeline.text.tokenizer import VOCAB_SIZE, encode
from tests.support.checkpoints import write_checkpoint
from tests.support.records import read_jsonl, write_jsonl

PREFIXES = [f"Number {n} of the lamps along the river was" for n in range(3)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    folder = tmp_path_factory.mktemp("base") / "model"
    GptOssForCausalLM(GptOssConfig(vocab_size=VOCAB_SIZE, **sizes, **heads)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "prefixes.jsonl", [{"text": text} for text in PREFIXES])
    write_jsonl(tmp_path / "questions.jsonl", [{"prompt": f"Why {n}?"} for n in range(4)])
    return tmp_path


def replay(folder: Path, base: Path, out: str, *options: str) -> int:
    plain = ("--prefixes", str(folder / "prefixes.jsonl"), "--max_new_tokens", "3")
    return main(["replay", "--model", str(base), "--out", str(folder / out), *plain, *options])


def mix_of(
    folder: Path, name: str = "replay/plain.jsonl", seq_len: int = 32, **keys: Any
) -> MixConfig:
    source = {
        "name": "own",
        "language": "en",
        "domain": "replay",
        "path": name,
        "weight": 1.0,
        "kind": "self_replay",
    }
    (folder / "mix.yaml").write_text(
        yaml.safe_dump({"seq_len": seq_len, "seed": 1, "sources": [source | keys]})
    )
    return load_mix(folder / "mix.yaml")


def test_the_same_seed_gives_the_same_text_and_another_seed_another(
    base: Path, folder: Path
) -> None:
    texts = {}
    for out, seed in (("a", "7"), ("b", "7"), ("c", "8")):
        assert replay(folder, base, out, "--seed", seed) == 0
        texts[out] = [record["text"] for record in read_jsonl(folder / out / "plain.jsonl")]
    assert texts["a"] == texts["b"] != texts["c"]
    assert len(texts["a"]) == len(PREFIXES)
    for text in texts["a"]:
        assert text.startswith("Number ") and len(text) > len("Number 1 of the lamps")
    sidecars = [json.loads((folder / out / SIDECAR).read_text()) for out in "ab"]
    assert sidecars[0] == sidecars[1] and sidecars[0]["settings"]["sampling"]["seed"] == 7
    assert sidecars[0]["settings"]["sampling"]["temperature"] == 1.0


def test_whole_replies_become_conversations_and_others_are_left_out_and_counted(
    base: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def part(channel: str, text: str) -> list[int]:
        return [CHANNEL, *encode(channel).tolist(), MESSAGE, *encode(text).tolist()]

    def reply(model: Any, prompts: list[list[int]], *_: Any, **__: Any) -> list[list[int]]:
        replies = []
        for prompt in prompts:
            analysis = [*part("analysis", "hm"), END, START, *encode("assistant").tolist()]
            if "2" in encode_text(prompt):
                replies.append(analysis + part("final", "cut"))
            else:
                replies.append([*analysis, *part("final", "42"), RETURN])
        return replies

    monkeypatch.setattr("cpt.offline.replies.generate", reply)
    questions = ("--questions", str(folder / "questions.jsonl"))
    arguments = ["replay", "--model", str(base), "--out", str(folder / "replay"), *questions]
    assert main(arguments) == 0
    records = read_jsonl(folder / "replay" / "chat.jsonl")
    assert [record["messages"][0]["content"] for record in records] == [
        "Why 0?",
        "Why 1?",
        "Why 3?",
    ]
    assert [(m["channel"], m["content"]) for m in records[0]["messages"][1:]] == [
        ("analysis", "hm"),
        ("final", "42"),
    ]
    assert json.loads((folder / "replay" / SIDECAR).read_text())["settings"]["left_out"] == {
        "plain": 0,
        "chat": 1,
    }
    mix = mix_of(folder, "replay/chat.jsonl", seq_len=256, format="harmony")
    built = build(mix, folder / "out", progress=False)
    assert built.sources[0].documents == 3 and len(built.sources[0].base_model) == 32


def encode_text(prompt: list[int]) -> str:
    from data_pipeline.text.tokenizer import encoding

    return encoding().decode(prompt).rsplit("<|start|>user", 1)[1]


def run_from(path: Path | None, baseline: Path | None = None) -> Any:
    return types.SimpleNamespace(
        model=types.SimpleNamespace(path=path, init=None if path else "tiny"),
        guard=types.SimpleNamespace(baseline_model=baseline),
        train=types.SimpleNamespace(seed=1),
    )


def test_a_run_from_another_model_refuses_the_replay(
    base: Path, folder: Path, tmp_path: Path
) -> None:
    assert replay(folder, base, "replay") == 0
    build(mix_of(folder), folder / "out", progress=False)
    data = BuiltData.open(folder / "out")
    check_replay(run_from(base), data)
    other = tmp_path / "other"
    GptOssForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(other)
    for path, place in ((other, "other"), (None, "random weights")):
        with pytest.raises(ConfigError, match=f"source 'own' was written by the model .*{place}"):
            check_replay(run_from(path), data)


def test_a_run_from_a_checkpoint_replays_what_its_baseline_model_wrote_and_nothing_else(
    base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = weights_hash([base / "model.safetensors"])
    (folder / "plain.jsonl").write_text(json.dumps({"text": " ".join(PREFIXES)}) + "\n")
    write_sidecar(folder, own, {}, ["plain.jsonl"])
    build(mix_of(folder, "plain.jsonl"), folder / "out", progress=False)
    data = BuiltData.open(folder / "out")
    checkpoint = write_checkpoint(tmp_path / "cpt", 10)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    save_file({"w": torch.zeros(1)}, other / "model.safetensors", {"format": "pt"})

    check_replay(run_from(checkpoint, baseline=base), data)
    check_replay(run_from(base, baseline=other), data)  # the model that the run starts from
    refusal = "source 'own' was written by the model .*, but the untouched model of this run is"
    with pytest.raises(ConfigError, match=f"{refusal} {other} .*guard.baseline_model"):
        check_replay(run_from(checkpoint, baseline=other), data)
    # what every start checks before its ranks meet reads no weights, and still refuses this
    hashed: list[str] = []
    monkeypatch.setattr(
        "data_pipeline.build.self_replay.xxh3_of", lambda file: hashed.append(file.name) or "0"
    )
    check_replay(run_from(checkpoint, baseline=other), data, reads_weights=False)
    for path, place in ((checkpoint, str(checkpoint)), (None, "tiny, seed 1")):
        with pytest.raises(ConfigError, match=f"{refusal} {place}"):
            check_replay(run_from(path), data, reads_weights=False)
    assert hashed == ["manifest.json"]


def test_edited_text_or_text_without_its_sidecar_is_refused_at_build(
    base: Path, folder: Path
) -> None:
    assert replay(folder, base, "replay") == 0
    path = folder / "replay" / "plain.jsonl"
    path.write_text(path.read_text() + json.dumps({"text": "a line of somebody else"}) + "\n")
    with pytest.raises(DataError, match=r"not the text that self_replay.json lists"):
        build(mix_of(folder), folder / "out", progress=False)
    (folder / "replay" / SIDECAR).unlink()
    with pytest.raises(DataError, match=r"no self_replay.json beside it"):
        build(mix_of(folder), folder / "out", progress=False)


def test_a_folder_that_exists_is_refused_and_its_files_are_not_replaced(
    base: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder / "data"
    data.mkdir()
    (folder / "prefixes.jsonl").rename(data / "plain.jsonl")
    before = (data / "plain.jsonl").read_bytes()
    own = ("--prefixes", str(data / "plain.jsonl"))
    assert replay(folder, base, "data", *own) == 78
    assert f"{data} exists already and is not overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in data.iterdir()} == {"plain.jsonl": before}


def test_a_line_ends_only_where_json_lines_end(base: Path, folder: Path) -> None:
    text = "Lamps\u2028along the river\x85were lit"
    line = json.dumps({"text": text}, ensure_ascii=False)
    (folder / "prefixes.jsonl").write_text(f"{line}\r\n\n{line}\n", encoding="utf-8", newline="")
    assert replay(folder, base, "replay") == 0
    assert len(read_jsonl(folder / "replay" / "plain.jsonl")) == 2


def test_few_long_replies_are_sampled_between_two_saves() -> None:
    options = RankOptions(save_every=32)
    found = [prompts_of_rank(options, Sampling(max_new_tokens=n)) for n in (64, 4096, 32768, 2**20)]
    assert found == [32, 32, 4, 1]


def test_a_request_that_cannot_be_right_is_refused(
    base: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["replay", "--model", str(base), "--out", str(folder / "x"), "--temperature", "0"]
    assert main(arguments) == 78
    printed = capsys.readouterr().err
    assert "--prefixes and --questions are both missing" in printed
    assert "--temperature is 0" in printed
    (folder / "prefixes.jsonl").write_text("{}\n")
    assert replay(folder, base, "y") == 65
    with pytest.raises(ConfigError, match="writes JSONL, not format: text"):
        mix_of(folder, "prefixes.jsonl", format="text")
