"""A run whose model answers prompts: before step 0, on its way, at its end, and after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.cli import main
from cpt.guard.generation.measures import measure_reply
from tests.support.service import STEPS, Service, make_workplace, run_to_end

pytestmark = pytest.mark.dist

PROMPTS = {"maths": ["1 + 1?", "2 + 2?", "3 + 3?"], "chat": ["\u3053\u3093\u306b\u3061\u306f"]}
MAX_NEW_TOKENS = 10


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workplace(tmp_path_factory.mktemp("generation"))
    mix = yaml.safe_load((folder / "mix.yaml").read_text())
    run = yaml.safe_load((folder / "run.yaml").read_text())
    domains: list[dict[str, Any]] = []
    for name, language in (("maths", "en"), ("chat", "ja")):
        records = [{"prompt": prompt, "answer": 2} for prompt in PROMPTS[name]]
        lines = [json.dumps(record) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        domain = {"name": name, "language": language, "path": f"{name}.jsonl"}
        domains.append({**domain, "max_new_tokens": MAX_NEW_TOKENS, "prompts_per_look": 2})
    domains[0]["sources"] = ["en_web"]
    mix["guard"]["generation"] = domains
    run["guard"] = {
        "interval_steps": 2,
        "generation_interval_steps": 4,
        "max_documents": 1,
        "policy": "warn",
    }
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix))
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture(scope="module")
def resumed(workplace: Path) -> Service:
    """A run of two ranks that was stopped between two looks and started again."""
    code, run = run_to_end(workplace, "asked", "--set", "train.stop_at_step=2")
    assert code == 0, run.output
    folder = run.run_dir / "guard" / "generation"
    before = {path.name: path.read_bytes() for path in folder.glob("untouched-*.json")}
    assert before.keys() == {"untouched-maths.json", "untouched-chat.json"}
    code, run = run_to_end(workplace, "asked")
    assert code == 0, run.output
    assert {name: (folder / name).read_bytes() for name in before} == before
    return run


def test_replies_are_measured_at_their_interval_and_at_the_end(resumed: Service) -> None:
    asked = [event for event in resumed.events("guard") if event["kind"] == "generation"]
    text = [event for event in resumed.events("guard") if event["kind"] == "text"]
    # step 2 was the end of the first start
    assert sorted({event["step"] for event in asked}) == [0, 2, 4, STEPS]
    assert sorted({event["step"] for event in text}) == [0, 2, 4, STEPS]
    for event in asked:
        assert event.keys() >= {"domain", "language", "measure", "rate", "baseline", "state"}
        assert event["prompts"] == {"maths": 2, "chat": 1}[event["domain"]]
    decision = resumed.events("guard_decision")[-1]
    assert {one["domain"] for one in decision["evidence"]} >= {"maths", "chat"}
    share = {one["domain"]: one["share"] for one in decision["evidence"]}
    assert share["chat"] is None


def test_stored_replies_are_those_that_were_measured(resumed: Service) -> None:
    folder = resumed.run_dir / "guard" / "generation"
    untouched = json.loads((folder / "untouched-maths.json").read_text())
    assert sorted(untouched["prompts"]) == PROMPTS["maths"]
    for reply, thinking_tokens in zip(
        untouched["replies"], untouched["measures"]["thinking_tokens"], strict=True
    ):
        assert 0 < len(reply) <= MAX_NEW_TOKENS
        assert measure_reply(reply, "en", ["2"]).thinking_tokens == thinking_tokens
    replies = json.loads((folder / f"replies-{STEPS:08d}.json").read_text())["domains"]
    assert len(replies["maths"]["replies"]) == 2 and len(replies["chat"]["replies"]) == 1


def test_every_decision_can_be_made_again(resumed: Service) -> None:
    assert main(["guard", "audit", "--run_dir", str(resumed.run_dir)]) == 0


def test_a_reply_that_was_tampered_with_is_found(resumed: Service, tmp_path: Path) -> None:
    """A file of the untouched model in which every reply was right makes the loss another one."""
    shutil.copy2(resumed.run_dir / "metrics.jsonl", tmp_path)
    guard = tmp_path / "guard"
    (guard / "generation").mkdir(parents=True)
    for path in (resumed.run_dir / "guard").rglob("*.json"):
        target = guard / path.relative_to(resumed.run_dir / "guard")
        target.write_bytes(path.read_bytes())
    forged = guard / "generation" / "untouched-maths.json"
    content = json.loads(forged.read_text())
    content["answers"] = [[] for _ in content["answers"]]
    forged.write_text(json.dumps(content))
    assert main(["guard", "audit", "--run_dir", str(tmp_path)]) == 70
