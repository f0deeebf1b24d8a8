"""A model's directory of others names code in every way that transformers knows, and none is run.

The plants are alive: the first test lets transformers run them where it is told to trust them.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GptOssConfig, GptOssForCausalLM

from cpt.cli import main
from cpt.errors import ConfigError
from cpt.export.tokenizer import TEMPLATE
from cpt.job.findings import Findings
from cpt.job.gate import check_named_files
from cpt.model.configuration import load_config
from cpt.model.foreign_code import refuse_foreign_code
from cpt.offline.evaluation.harness import score_harness
from cpt.offline.evaluation.scored_model import ExportedModel
from cpt.offline.evaluation.tasks import load_tasks
from cpt.offline.plain_model import load_export
from data_pipeline.text.harmony import STOP_IDS
from data_pipeline.text.tokenizer import VOCAB_SIZE
from tests.support.launcher import ROOT
from tests.support.records import write_jsonl

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}
MODEL_MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
TOKENIZER_MAP = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
ENDLESS = "{% for i in range(10 ** 9) %}{{ 'x' * 1000 }}{% endfor %}"
REACHING = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os }}"
EVIL = """
from pathlib import Path
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedTokenizerFast

Path(MARK).write_text("ran")


class EvilConfig(GptOssConfig):
    model_type = "evil"


class EvilModel(GptOssForCausalLM):
    config_class = EvilConfig


class EvilTokenizer(PreTrainedTokenizerFast):
    pass


def generate(model, *args, **kwargs):
    return []
"""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean") / "model"
    torch.manual_seed(3)
    GptOssForCausalLM(GptOssConfig(vocab_size=VOCAB_SIZE, **SIZES)).save_pretrained(folder)
    Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    return folder


class Plants:
    """A copy of a model with code in it, and the file that the code would leave."""

    def __init__(self, clean: Path, folder: Path) -> None:
        self.model = folder / "planted"
        shutil.copytree(clean, self.model, copy_function=os.link)
        self.mark = folder / "mark"
        source = EVIL.replace("MARK", repr(str(self.mark)))
        (self.model / "evil.py").write_text(source)

    def change(self, name: str, **values: Any) -> None:
        """Set keys of a JSON file of the directory."""
        file = self.model / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.unlink(missing_ok=True)  # it is a link to that of the clean model
        file.write_text(json.dumps({**content, **values}))

    def add(self, name: str, text: str) -> None:
        """Write a file of the directory."""
        file = self.model / name
        file.parent.mkdir(exist_ok=True)
        file.unlink(missing_ok=True)
        file.write_text(text)

    def fill(self) -> None:
        """Plant code beside a config.json that stays sound."""
        self.change("tokenizer_config.json", auto_map=TOKENIZER_MAP, tokenizer_class="Evil")
        self.change("processor_config.json", auto_map={"AutoProcessor": "evil.EvilTokenizer"})
        self.change("generation_config.json", custom_generate="evil", temperature=0.5)
        self.add("custom_generate/generate.py", (self.model / "evil.py").read_text())
        self.add("chat_template.jinja", ENDLESS)
        self.add("additional_chat_templates/tool_use.jinja", REACHING)


@pytest.fixture
def plants(clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plants:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    # somebody who agrees to everything that he is asked
    monkeypatch.setattr(sys, "stdin", io.StringIO(100 * "y\n"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Plants(clean, tmp_path)


@pytest.mark.parametrize("what", ["model", "tokenizer", "generate"])
def test_the_plants_run_where_they_are_trusted(plants: Plants, what: str) -> None:
    plants.fill()
    if what == "model":
        plants.change("config.json", auto_map=MODEL_MAP, model_type="evil")
        AutoModelForCausalLM.from_pretrained(str(plants.model), trust_remote_code=True)
    elif what == "tokenizer":
        AutoTokenizer.from_pretrained(str(plants.model), trust_remote_code=True)
    else:
        GptOssForCausalLM.from_pretrained(str(plants.model), trust_remote_code=True)
    assert plants.mark.exists()


def commands(plants: Plants, folder: Path) -> dict[str, list[str]]:
    """Return the command lines that load a model, on the planted one."""
    model = str(plants.model)
    out = str(folder / "out")
    write_jsonl(folder / "text.jsonl", [{"text": "one two three four five"}])
    task = {"name": "text", "kind": "perplexity", "language": "en", "path": "text.jsonl"}
    (folder / "tasks.yaml").write_text(json.dumps({"tasks": [{**task, "max_drop": 5.0}]}))
    prompts = ["--prefixes", str(folder / "text.jsonl"), "--max_new_tokens", "2"]
    given = ["--model", model]
    sources = ["--source", "web", "--out", out]
    scored = ["--tasks", str(folder / "tasks.yaml"), "--no_baseline", "--out", f"{out}.json"]
    return {
        "sample": ["sample", *given, "--prompt", "hi", "--max_new_tokens", "2"],
        "chat": ["sample", *given, "--prompt", "hi", "--chat", "--max_new_tokens", "2"],
        "evaluate": ["evaluate", *given, *scored],
        "merge": ["merge", "--base", model, "--tuned", model, "--alpha", "1", "--out", out],
        "replay": ["replay", *given, "--out", out, *prompts],
        "kl_targets": ["kl_targets", *given, "--build", str(folder), *sources],
        "suite check": ["suite", "check", *given],
    }


COMMANDS = ("sample", "chat", "evaluate", "merge", "replay", "kl_targets", "suite check")
CONFIGS = {
    "auto_map": {"auto_map": MODEL_MAP},
    "finding 3": {"auto_map": MODEL_MAP, "model_type": "evil"},
    "hub kernel": {"attn_implementation": "somebody/kernel"},
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.case("X3", "code that a config.json names is refused by every command")
def test_code_in_a_configuration_is_refused_by_every_command(
    plants: Plants, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = commands(plants, tmp_path)[command]
    for name, values in CONFIGS.items():
        shutil.copyfile(plants.model / "config.json", tmp_path / "kept.json")
        plants.change("config.json", **values)
        assert main(words) == 78, name
        assert str(plants.model / "config.json") in capsys.readouterr().err
        shutil.copyfile(tmp_path / "kept.json", plants.model / "config.json")
    assert not plants.mark.exists()
    assert sys.stdin.read() == 100 * "y\n", "somebody was asked"


def test_code_in_a_configuration_is_refused_by_training(plants: Plants, tmp_path: Path) -> None:
    for values in CONFIGS.values():
        plants.change("config.json", model_type="gpt_oss", auto_map=None)
        plants.change("config.json", **values)
        (tmp_path / "run.yaml").write_text(f"model:\n  path: {plants.model}\n")
        found = Findings()
        check_named_files(tmp_path / "run.yaml", {}, found)
        told = "\n".join(map(str, found.errors))
        assert str(plants.model / "config.json") in told, told
    assert not plants.mark.exists()


@pytest.mark.parametrize("command", ["sample", "chat", "evaluate", "merge", "replay"])
@pytest.mark.case("X3", "code beside a sound config.json is not run and not carried on")
def test_code_beside_a_sound_configuration_is_not_run_and_not_carried_on(
    plants: Plants, tmp_path: Path, command: str
) -> None:
    plants.fill()
    words = commands(plants, tmp_path)[command]
    assert main(words) == 0
    assert not plants.mark.exists()
    assert sys.stdin.read() == 100 * "y\n", "somebody was asked"
    written = [file for file in (tmp_path / "out").rglob("*") if file.suffix != ".safetensors"]
    for file in written:
        if file.is_file():
            content = file.read_text(encoding="utf-8")
            for word in ("auto_map", "evil", "custom_generate", "10 ** 9", "__globals__", "0.5"):
                assert word not in content or file.name == "tokenizer.json", (file.name, word)
    if command == "merge":
        merged = tmp_path / "out" / "alpha-1"
        assert (merged / "chat_template.jinja").read_text() == TEMPLATE.read_text()
        settings = json.loads((merged / "tokenizer_config.json").read_text())
        assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_harness_gets_our_own_tokenizer(
    plants: Plants, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plants.fill()
    given = {}

    def language_model(**keys: Any) -> Any:
        given.update(keys)
        raise KeyboardInterrupt

    for name, attributes in {
        "lm_eval": {"simple_evaluate": print},
        "lm_eval.models.huggingface": {"HFLM": language_model},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    task = {"name": "hs", "kind": "harness", "language": "en", "task": "a", "metric": "acc"}
    (tmp_path / "tasks.yaml").write_text(json.dumps({"tasks": [{**task, "max_drop": 5.0}]}))
    tasks = load_tasks(tmp_path / "tasks.yaml")
    with pytest.raises(KeyboardInterrupt):
        score_harness(tasks, {}, None, ExportedModel(plants.model), 1)
    assert not plants.mark.exists()
    assert given["tokenizer"].chat_template is None
    assert given["tokenizer"]("hi there").input_ids == [3686, 1354]


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP}),
        ("processor_config.json", {"auto_map": {}}),
        ("generation_config.json", {"custom_generate": "somebody/method"}),
        ("image_processor_config.json", {"auto_map": {}}),
        ("tokenizer_config.json", {"init": [{"auto_map": TOKENIZER_MAP}]}),
        ("config.json", {"text_config": {"auto_map": TOKENIZER_MAP}}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_a_directory_with_code_is_not_handed_to_servers(
    plants: Plants, file: str, values: dict[str, Any]
) -> None:
    refuse_foreign_code(plants.model, "--model")
    plants.change(file, **values)
    with pytest.raises(ConfigError, match=f"{file}: (auto_map|custom_generate) names Python"):
        refuse_foreign_code(plants.model, "--model")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"text_config": {"attn_implementation": "a/b"}}, "attn_implementation names code"),
        ({"speculators_config": {"verifier": {}}}, "speculators_config names another model"),
    ],
    ids=["kernel", "speculators"],
)
def test_a_configuration_that_has_something_fetched_is_not_handed_to_servers(
    plants: Plants, values: dict[str, Any], words: str
) -> None:
    plants.change("config.json", **values)
    with pytest.raises(ConfigError, match=words):
        refuse_foreign_code(plants.model, "--model")


def test_an_adapter_is_not_handed_to_servers(plants: Plants) -> None:
    plants.change("adapter_config.json", peft_type="LORA", base_model_name_or_path="somebody/x")
    with pytest.raises(ConfigError, match="for which another model is fetched"):
        refuse_foreign_code(plants.model, "--model")


def test_pickles_alone_are_not_handed_to_servers(plants: Plants) -> None:
    plants.add("pytorch_model.bin", "x")
    refuse_foreign_code(plants.model, "--model")
    for file in plants.model.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"weights are pickles \(pytorch_model.bin\)"):
        refuse_foreign_code(plants.model, "--model")


def test_model_of_another_architecture_may_be_scored(plants: Plants) -> None:
    plants.change("config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    refuse_foreign_code(plants.model, "--model")


def test_folder_with_a_writer_of_replies_is_not_handed_to_servers(plants: Plants) -> None:
    plants.add("custom_generate/generate.py", "")
    with pytest.raises(ConfigError, match="is code that is to write the replies"):
        refuse_foreign_code(plants.model, "--model")


def test_adapter_beside_the_weights_is_refused(plants: Plants) -> None:
    plants.change("adapter_config.json", peft_type="LORA", base_model_name_or_path="somebody/x")
    with pytest.raises(ConfigError, match="holds an adapter"):
        load_export(plants.model)


def test_settings_of_generation_are_ours(plants: Plants) -> None:
    plants.change("generation_config.json", max_length=2, eos_token_id=[0], temperature=9.0)
    settings = load_export(plants.model).generation_config
    assert settings.eos_token_id == list(STOP_IDS) and settings.temperature is None


def cache_of(model: Path, folder: Path) -> Path:
    """Lay a model out as the cache of the Hub does, and return its snapshot."""
    root = folder / "hub" / "models--somebody--model"
    snapshot = root / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        if file.is_file():
            blob = root / "blobs" / f"{number:040x}"
            shutil.copyfile(file, blob)
            (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_cache_of_the_hub_and_links_to_directories_are_checked_alike(
    plants: Plants, tmp_path: Path
) -> None:
    snapshot = cache_of(plants.model, tmp_path)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = load_export(plants.model)(ids).logits
        for place in (snapshot, link):
            assert torch.equal(load_export(place)(ids).logits, expected)
    blob = (snapshot / "config.json").resolve()
    blob.write_text(json.dumps({**json.loads(blob.read_text()), "auto_map": MODEL_MAP}))
    for place in (snapshot, link):
        with pytest.raises(ConfigError, match="auto_map names Python files"):
            load_config(place, None)
    assert not plants.mark.exists()


@pytest.mark.slow
def test_a_person_who_says_yes_is_not_asked_by_the_real_command(plants: Plants) -> None:
    plants.change("config.json", auto_map=MODEL_MAP, model_type="evil")
    words = [sys.executable, "-m", "cpt.cli", "sample", "--model", str(plants.model)]
    done = subprocess.run(
        [*words, "--prompt", "hi"],
        input="y\n",
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(plants.mark.parent / "hf")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 78 and "model_type is 'evil'" in done.stderr, done.stderr
    assert not plants.mark.exists()
