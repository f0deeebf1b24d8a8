"""evaluate.sbatch serves an export, runs the benchmarks against it, and judges what it finds.

vLLM and lighteval are stand-ins with their interfaces; lm-evaluation-harness is the real one, with
a task from local files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.support.job_scripts import write_program
from tests.support.launcher import ROOT
from tests.support.lm_eval import require_lm_eval
from tests.support.records import write_jsonl
from tests.support.served_model import LIGHTEVAL, VLLM, write_python_program

SUITE = """
asking: {max_new_tokens: 500, prompt_tokens: 300}
concurrency: 4
benchmarks:
  - {name: sums, language: en, tool: lm_eval, task: local_sums, metric: exact_match, max_drop: 12,
     include_path: tasks}
  - {name: physics, language: ja, tool: lighteval, task: "swallow|sums", metric: extractive_match,
     max_drop: 12}
"""
TASK = """
task: local_sums
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:"], temperature: 0.0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""
SECRETS = {"HF_TOKEN": "hf_canary_4711", "WANDB_API_KEY": "wandb_canary_4711"}
KEY = {"OPENAI_API_KEY": "openai_canary_4711"}


@dataclass(kw_only=True)
class Workplace:
    """A folder with an export, a suite and stand-ins."""

    folder: Path
    variables: dict[str, str]

    def run(self, *words: str, **variables: str) -> tuple[int, str]:
        """Run the job template, and return its exit code and output."""
        done = subprocess.run(
            ["bash", str(ROOT / "slurm" / "evaluate.sbatch"), *words],
            cwd=ROOT,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            timeout=240,
        )
        return done.returncode, done.stdout + done.stderr

    def requests(self) -> list[dict[str, Any]]:
        """Return what the server was asked."""
        lines = (self.folder / "requests").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def servers(self) -> list[list[str]]:
        """Return process id, address and tensor-parallel size of each server that was started."""
        return [line.split() for line in (self.folder / "pid").read_text().splitlines()]


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    write_python_program(tmp_path / "bin" / "vllm", VLLM)
    write_python_program(tmp_path / "bin" / "lighteval", LIGHTEVAL)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    weights = save({"model.norm.weight": torch.ones(4)})
    (tmp_path / "export" / "model.safetensors").write_bytes(weights)
    records = [{"question": f"What is {n} + 5?", "answer": str(n + 5)} for n in range(200)]
    write_jsonl(tmp_path / "sums.jsonl", records)
    (tmp_path / "tasks").mkdir()
    data = json.dumps(str(tmp_path / "sums.jsonl"))
    (tmp_path / "tasks" / "local_sums.yaml").write_text(TASK.replace("DATA", data))
    (tmp_path / "suite.yaml").write_text(SUITE)
    (tmp_path / "env.sh").write_text("")
    variables = {
        **os.environ,
        **SECRETS,
        **KEY,
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PID": str(tmp_path / "pid"),
        "REQUESTS": str(tmp_path / "requests"),
        "CPT_ENV": str(tmp_path / "env.sh"),
        "CPT_RUN_DIR": str(tmp_path / "run"),
        "CPT_CONFIG": "run.yaml",
        "CPT_DS_CONFIG": "ds.json",
        "CPT_VENV": sys.prefix,
        "CPT_SUITE": str(tmp_path / "suite.yaml"),
        "CPT_VLLM_CONTEXT": "800",
        "SLURM_GPUS_ON_NODE": "2",
        # a proxy that nobody may ask for an address of this machine
        "http_proxy": "http://127.0.0.1:9",
    }
    return Workplace(folder=tmp_path, variables=variables)


def test_base_and_checkpoint_are_served_asked_compared_and_nothing_stays_behind(
    workplace: Workplace,
) -> None:
    require_lm_eval()
    export = ("--export", str(workplace.folder / "export"))
    base = workplace.folder / "base"
    code, output = workplace.run(str(base), *export)
    assert code == 0, output
    result = json.loads((base / "evaluation.json").read_text())
    values = {name: task["value"] for name, task in result["tasks"].items()}
    assert values == {"sums": 100, "physics": 100}
    assert [task["documents"] for task in result["tasks"].values()] == [200, 400]
    assert result["settings"]["versions"] == {"lm_eval": "0.4.13", "lighteval": "79cd3a8"}
    asked = workplace.requests()
    assert len(asked) == 600
    assert {request["temperature"] for request in asked} == {1.0}
    assert {request["top_p"] for request in asked} == {1.0}
    by_harness = [request for request in asked if "reasoning_effort" in request]
    assert len(by_harness) == 200
    for request in by_harness:
        # stop words would end the thinking
        assert (request["reasoning_effort"], request["stop"]) == ("medium", [])
        assert request["max_tokens"] == 500

    now = workplace.folder / "now"
    words = [str(now), *export, "--baseline", str(base / "evaluation.json")]
    code, output = workplace.run(*words, "--only", "physics", WRONG_OF_TEN="2")
    assert code == 65, output
    assert "task 'physics' dropped by 20.00" in output
    assert "from 100.000 to 80.000; 80 answers lost, 0 won" in output
    code, output = workplace.run(*words, "--only", "physics", WRONG_OF_TEN="0")
    assert code == 65 and "physics: done before" in output, output
    (verdict,) = json.loads((now / "evaluation.json").read_text())["verdicts"]
    assert (verdict["state"], verdict["lost"], verdict["won"]) == ("dropped", 80, 0)

    assert [words[1:] for words in workplace.servers()] == [["127.0.0.1", "2"]] * 3
    for number, _, _ in workplace.servers():
        assert not Path(f"/proc/{number}").exists()
    for file in [*base.rglob("*"), *now.rglob("*")]:
        if file.is_file():
            content = file.read_bytes()
            for secret in (*SECRETS.values(), *KEY.values()):
                assert secret.encode() not in content, file


EXPORTER = """
if [[ "$3" == export ]]; then
    echo "$*" >>"$CALLS"
    while [[ "$1" != --out ]]; do shift; done
    mkdir -p "$2" && echo {} >"$2/config.json" && PYTHON -c "$WRITE_WEIGHTS" "$2"
    exit
fi
exec PYTHON "$@"
"""


WRITE_WEIGHTS = """
import json, sys
content = sys.argv[1].encode()
entry = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
header = json.dumps({"weight": entry}).encode()
with open(sys.argv[1] + "/model.safetensors", "wb") as file:
    file.write(len(header).to_bytes(8, "little") + header + content)
"""
"""Weights that differ between exports, written without torch, which takes seconds to import."""


def test_a_step_is_exported_once_and_named_in_the_result(workplace: Workplace) -> None:
    program = workplace.folder / "venv" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/bash\n{EXPORTER.replace('PYTHON', sys.executable)}")
    program.chmod(0o755)
    calls = workplace.folder / "calls"
    out = workplace.folder / "out"
    words = [str(out), "--step", "40", "--only", "physics", "--format", "mxfp4"]
    variables = {
        "CPT_VENV": str(workplace.folder / "venv"),
        "CALLS": str(calls),
        "WRITE_WEIGHTS": WRITE_WEIGHTS,
    }
    # what is missing is said before anything is exported or served
    for name, said in (("CPT_LIGHTEVAL", "--lighteval '/no'"), ("CPT_VLLM", "CPT_VLLM=/no")):
        code, output = workplace.run(*words, **variables, **{name: "/no"})
        assert code == 78 and f"{said}: no such program" in output, output
        assert not calls.exists() and not out.exists()
    for _ in range(2):
        code, output = workplace.run(*words, **variables)
        assert code == 0, output
    run_dir = workplace.folder / "run"
    words = ["-m", "cpt.cli", "export", "--run_dir", str(run_dir), "--step", "40"]
    words += ["--out", f"{out}/export-step-40-mxfp4", "--format", "mxfp4", "--score", "never"]
    assert calls.read_text() == " ".join(words) + "\n"
    assert json.loads((out / "evaluation.json").read_text())["step"] == 40

    # the scores of one step are not those of another
    code, output = workplace.run(str(out), "--step", "80", "--only", "physics", **variables)
    assert code == 78 and "these are results of another model" in output, output
    assert (
        calls.read_text()
        .splitlines()[1]
        .endswith(f"--out {out}/export-step-80-trained --format trained --score never")
    )


def test_tools_are_looked_for_where_they_will_run_before_a_server_starts(
    workplace: Workplace,
) -> None:
    # an image that has Python and nothing beside it
    inside = 'while [[ "$1" != *.sif ]]; do shift; done\nshift\n'
    inside += f'PATH={workplace.folder}/image:/usr/bin:/bin exec "$@"\n'
    write_program(workplace.folder / "bin" / "apptainer", inside)
    image = workplace.folder / "image"
    write_program(image / "python", f'exec {sys.executable} "$@"\n')
    words = [str(workplace.folder / "out"), "--export", str(workplace.folder / "export")]
    container = {"CPT_CONTAINER": "apptainer", "CPT_IMAGE": "cpt.sif"}
    code, output = workplace.run(*words, "--only", "physics", **container)
    assert code == 78 and "--lighteval 'lighteval': no such program" in output, output
    assert "start inside cpt.sif" in output
    assert not (workplace.folder / "pid").exists()
    (image / "lighteval").symlink_to(workplace.folder / "bin" / "lighteval")
    code, output = workplace.run(*words, "--only", "physics", **container, VLLM_DIES="1")
    assert code == 70 and "CUDA out of memory" in output, output


def test_a_server_that_does_not_come_up_ends_the_job_with_its_last_words(
    workplace: Workplace,
) -> None:
    words = [str(workplace.folder / "out"), "--export", str(workplace.folder / "export")]
    words += ["--only", "physics"]
    code, output = workplace.run(*words, VLLM_DIES="1")
    assert code == 70 and "CUDA out of memory" in output
    code, output = workplace.run(*words, VLLM_HANGS="1", CPT_VLLM_START_SECONDS="2")
    assert code == 70 and "vLLM does not answer after CPT_VLLM_START_SECONDS=2" in output


def test_a_benchmark_that_fails_is_named_and_the_others_are_kept(workplace: Workplace) -> None:
    out = workplace.folder / "out"
    words = [str(out), "--export", str(workplace.folder / "export"), "--only", "physics"]
    code, output = workplace.run(*words, LIGHTEVAL_FAILS="swallow|sums|0")
    assert code == 70 and f"See {out}/physics/log.txt" in output, output
    assert "DatasetNotFoundError" in (out / "physics" / "log.txt").read_text()
    assert workplace.run(*words)[0] == 0


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        ([], {}, "usage: sbatch slurm/evaluate.sbatch OUT_DIR"),
        (["out"], {}, "usage: "),
        (["out", "--step", "newest"], {}, "usage: "),
        (["out", "--export", "DIR", "--only"], {}, "usage: "),
        (["out", "--export", "/no"], {}, "/no is no Hugging Face directory"),
        (["out", "--export", "DIR", "--baseline", "/no"], {}, "--baseline /no: no such file."),
        (["out", "--export", "DIR"], {"CPT_VLLM": "/no/vllm"}, "CPT_VLLM=/no/vllm: no such"),
        (["out", "--export", "DIR"], {"SLURM_GPUS_ON_NODE": ""}, "the job has no GPUs"),
        (
            ["out", "--export", "DIR"],
            {"CPT_LIGHTEVAL": "/no/lighteval", "CPT_LM_EVAL": "bash"},
            "--lighteval '/no/lighteval': no such program",
        ),
        (
            ["out", "--export", "DIR"],
            {"CPT_LIGHTEVAL": "bash", "CPT_LM_EVAL": "bash", "CPT_VLLM_CONTEXT": "700"},
            "the server has a context of 700 tokens, the suite needs 800",
        ),
        (
            ["out", "--export", "DIR"],
            {"CPT_LIGHTEVAL": "bash", "CPT_LM_EVAL": "bash", "VLLM_SERVES": str(ROOT)},
            "serves 'export', not --model",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    workplace: Workplace, words: list[str], variables: dict[str, str], said: str
) -> None:
    places = {"out": str(workplace.folder / "out"), "DIR": str(workplace.folder / "export")}
    code, output = workplace.run(*[places.get(word, word) for word in words], **variables)
    assert code == 78 and said in output, output
