"""Every shipped recipe passes its dry run on the GPUs it is for once its corpora are there, and its
comment gives the planner's figures.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpt.config import LaunchInfo, load, resolve
from cpt.job.run_dir import checkpoint_bytes, stored_numels
from cpt.model.configuration import load_config
from cpt.planning.estimate import estimate
from cpt.planning.hardware import GPUS, Assumptions
from cpt.planning.memory import count_parameters
from cpt.resilience.stop import StopRequest
from cpt.run import main
from tests.support.launcher import ROOT
from tests.support.mix_corpora import template_with_corpora

ALL = sorted(
    path for path in (ROOT / "configs").glob("gpt-oss-*.yaml") if "By cpt plan" in path.read_text()
)
TUNING = [path for path in ALL if "-sft" in path.stem or "-lora-" in path.stem]
RECIPES = [path for path in ALL if path not in TUNING]
LAST_PHASES = [path for path in ALL if "-mxfp4" in path.stem]
CARDS = {
    "RTX 4090 24 GB": "rtx4090",
    "L40S 48 GB": "l40s",
    "H100 80 GB": "h100",
    "H200 141 GB": "h200",
}
NODES = {"80gb": 2e12, "141gb": 1e12}
"""Host memory of the nodes of 8 GPUs that 120b fits on, by the end of a recipe's name."""
BYTES_A_SECOND = 2e9
"""Rate at which docs/reliability.md (Stopping) reckons a save of shared storage."""
ON_ONE_NODE = [path for path in RECIPES if "120b" in path.stem and "-8gpu-" in path.stem]
WANTED = {("20b", 4096, 8), ("20b", 8192, 8), ("20b", 32768, 8), ("20b", 131072, 16)} | {
    ("120b", seq_len, gpus) for seq_len in (4096, 32768) for gpus in (8, 16, 32, 64)
}


class Recipe:
    """What the comment of a recipe says."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.path, self.comment = path, text[: text.index("model:")].replace("\n# ", " ")
        nodes = re.search(r"--num_nodes (\d+) --num_gpus 8", self.comment)
        self.world_size = 8 * int(nodes[1]) if nodes else 8
        if "--num_gpus 1 " in self.comment:
            self.world_size = 1
        self.gpu = CARDS[self.find(r"By cpt plan for (.+?), computed")]
        """Its name in the planner."""
        self.ds_config = ROOT / self.find(r"--ds_config (\S+)")
        self.model = self.find(r"(gpt-oss-\d+b)")

    def find(self, pattern: str) -> str:
        found = re.search(pattern, self.comment)
        assert found, f"{self.path.name} says nothing like {pattern}"
        return found[1]


def test_recipes_are_there_for_every_machine_that_is_promised() -> None:
    found = set()
    for recipe in map(Recipe, RECIPES):
        run, _ = load(recipe.path, recipe.ds_config, {})
        found.add((recipe.model.removeprefix("gpt-oss-"), run.train.seq_len, recipe.world_size))
    assert found == WANTED


@pytest.mark.parametrize("path", TUNING, ids=lambda path: path.stem)
def test_recipe_of_fine_tuning_is_judged_against_the_release(path: Path) -> None:
    run, _ = load(path, Recipe(path).ds_config, {})
    release = run.guard.baseline_model or run.model.path
    assert release is not None and release.name == Recipe(path).model
    assert release.parent.name == "models"


def test_recipes_of_fine_tuning_are_there_for_every_machine_that_is_promised() -> None:
    found = set()
    for recipe in map(Recipe, TUNING):
        run, _ = load(recipe.path, recipe.ds_config, {})
        found.add((recipe.model, run.adapter.kind, recipe.gpu, recipe.world_size))
    assert found == {
        ("gpt-oss-20b", "lora", "rtx4090", 1),
        ("gpt-oss-20b", "lora", "l40s", 1),
        ("gpt-oss-20b", "lora", "h100", 1),
        ("gpt-oss-20b", "none", "h100", 8),
        ("gpt-oss-120b", "lora", "h100", 1),
        ("gpt-oss-120b", "lora", "h100", 8),
        ("gpt-oss-120b", "none", "h100", 16),
    }


def test_recipes_of_a_last_phase_are_there_after_pretraining_and_after_fine_tuning() -> None:
    found = set()
    for recipe in map(Recipe, LAST_PHASES):
        found.add((recipe.model, "-sft" in recipe.path.stem))
    assert found == {
        (model, is_sft) for model in ("gpt-oss-20b", "gpt-oss-120b") for is_sft in (False, True)
    }


@pytest.mark.parametrize("path", LAST_PHASES, ids=lambda path: path.stem)
def test_last_phase_rounds_from_its_first_step_what_another_recipe_has_trained(path: Path) -> None:
    recipe = Recipe(path)
    run, _ = load(path, recipe.ds_config, {})
    assert run.train.quantize.is_on_after(0)
    assert run.model.path is not None and run.model.path.parent.name == "runs"
    before = ROOT / "configs" / f"{run.model.path.name}.yaml"
    other, _ = load(before, Recipe(before).ds_config, {})
    assert other.train.seq_len == run.train.seq_len
    assert other.data.mix == run.data.mix
    assert Recipe(before).world_size == recipe.world_size
    assert run.guard.baseline_model is not None and run.guard.baseline_model.name == recipe.model


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe_starts_from_the_release_or_from_where_another_recipe_trains(path: Path) -> None:
    recipe = Recipe(path)
    run, _ = load(path, recipe.ds_config, {})
    for model in (run.model.path, run.guard.baseline_model):
        if model is not None and model.parent.name == "runs":
            assert model.parent.resolve() == ROOT / "runs"
            # without --run_dir a run has the name of its YAML
            before = ROOT / "configs" / f"{model.name}.yaml"
            assert before in ALL and before != path, f"no recipe trains into {model}"
            assert Recipe(before).model == recipe.model
        elif model is not None:
            assert model.resolve() == ROOT / "models" / recipe.model


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch, large_disk: None) -> Callable[..., int]:
    """`dry_run(recipe, setting, ...)`: the exit code of the recipe's dry run, on its GPUs."""

    def run(recipe: Recipe, *settings: str, gpu: str | None = None) -> int:
        ranks = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": recipe.world_size,
            "LOCAL_SIZE": min(8, recipe.world_size),
            "MASTER_PORT": 1,
        }
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        for name, value in ranks.items():
            monkeypatch.setenv(name, str(value))
        files = ["--ds_config", str(recipe.ds_config), "--config", str(recipe.path)]
        no_weights_ship = [
            f"model.init={recipe.model}",
            "model.path=null",
            "guard.baseline_model=null",
        ]
        if load(recipe.path, recipe.ds_config, {})[0].adapter.base == "mxfp4":
            no_weights_ship.append("adapter.base=bf16")  # random weights cannot be packed
        options = [word for item in [*no_weights_ship, *settings] for word in ("--set", item)]
        if gpu is not None:
            options += ["--gpu", gpu]
        return main([*files, "--dry_run", *options], StopRequest())

    return run


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe_passes_its_dry_run_once_its_corpora_are_there(
    path: Path, dry_run: Callable[..., int], capsys: Any, tmp_path: Path
) -> None:
    recipe = Recipe(path)
    run, _ = load(path, recipe.ds_config, {})
    mix = template_with_corpora(run.data.mix.stem, tmp_path, seq_len=run.train.seq_len)
    assert dry_run(recipe, f"data.mix={mix}") == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert re.search(rf"world size +{recipe.world_size}\n", printed)
    assert "memory of one rank" in printed
    assert f"--config {path.relative_to(ROOT)}" in recipe.comment


def test_120b_has_recipes_for_one_node_of_each_kind() -> None:
    found = {tuple(path.stem.split("-")[3::2]) for path in ON_ONE_NODE}
    assert found == set(itertools.product(("4k", "32k"), NODES))


@pytest.mark.parametrize("path", ON_ONE_NODE, ids=lambda path: path.stem)
def test_120b_on_one_node_leaves_a_tenth_of_device_and_host_free(
    path: Path, dry_run: Callable[..., int], capsys: Any, tmp_path: Path
) -> None:
    recipe = Recipe(path)
    run, _ = load(path, recipe.ds_config, {})
    assert run.checkpoint.async_save == "stream", "a copy of the state would be 1.4 TB"
    mix = template_with_corpora(run.data.mix.stem, tmp_path, seq_len=run.train.seq_len)
    assert dry_run(recipe, f"data.mix={mix}", gpu=recipe.gpu) == 0
    printed = capsys.readouterr().out
    assert ("AdamW, moments in int8" in printed) == (run.train.optimizer_state == "int8")
    device = float(re.findall(r"sum +([\d.]+) GiB", printed)[0])
    assert device * 2**30 <= 0.9 * GPUS[recipe.gpu].memory_bytes
    size, unit = re.findall(r"of the 8 ranks of a node: ([\d.,]+) (GB|TB)", printed)[0]
    host = float(size) * {"GB": 1e9, "TB": 1e12}[unit]
    assert 0 < host <= 0.9 * NODES[path.stem.rsplit("-", 1)[1]]
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{path.name}` .*$", page, re.MULTILINE)
    speed = re.findall(r"([\d,]+) tokens/s/GPU", recipe.comment)[0]
    assert f"| {device:.1f} of " in row
    assert row.endswith(f"| {size} {unit} | {speed} |")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe_has_time_for_two_saves_before_its_job_ends(path: Path) -> None:
    """A stop waits for the save in flight and then makes its own; the rate is that of the docs."""
    recipe = Recipe(path)
    model = load_config(None, recipe.model)
    run, ds_json = load(path, recipe.ds_config, {})
    ranks = min(8, recipe.world_size)
    launch = LaunchInfo(world_size=recipe.world_size, local_world_size=ranks)
    config = resolve(run, ds_json, model, launch)
    seconds = 2 * checkpoint_bytes(config, stored_numels(config, model)) / BYTES_A_SECOND
    assert seconds <= run.checkpoint.stop_budget_seconds
    assert seconds <= run.checkpoint.stop_margin_seconds
    told = path.read_text(encoding="utf-8")
    # the signal of the template's head, ten minutes before the end, has to come early enough, too
    if seconds > 600:
        assert f"--signal=B:USR1@{run.checkpoint.stop_margin_seconds} " in told


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe_trains_on_no_sample_and_names_the_corpora_that_are_missing(
    path: Path, dry_run: Callable[..., int], capsys: Any
) -> None:
    assert dry_run(Recipe(path)) == 78
    refusal = capsys.readouterr().err
    template = r"configs/mixes/gpt-oss-(\d+b|sft).yaml"
    assert re.search(rf"{template}:\d+: sources\[0\].path", refusal)
    assert re.search(r"'../../corpora/ja_(web|chat)/\S+', which matches no file", refusal)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe_says_which_seq_len_its_template_needs(path: Path) -> None:
    run, _ = load(path, Recipe(path).ds_config, {})
    template = re.search(r"(?m)^seq_len: (\d+)$", run.data.mix.read_text(encoding="utf-8"))
    assert template
    if int(template[1]) != run.train.seq_len:
        assert f"set its seq_len to {run.train.seq_len}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_figures_of_the_comment_are_those_of_the_planner(path: Path) -> None:
    """Within 10 %: when the estimate changes by more, so must the comment."""
    recipe = Recipe(path)
    model = load_config(None, recipe.model)
    run, ds_json = load(path, recipe.ds_config, {})
    config = resolve(
        run,
        ds_json,
        model,
        LaunchInfo(world_size=recipe.world_size, local_world_size=min(8, recipe.world_size)),
    )
    gpu = GPUS[recipe.gpu]
    counts = count_parameters(model, (), run.adapter)
    found = estimate(config, model, counts, gpu, Assumptions())
    assert found.fits
    room = Assumptions().memory_share * gpu.memory_bytes / 2**30
    assert float(recipe.find(rf"([\d.]+) GiB of {room:.1f}")) == pytest.approx(
        sum(found.memory.values()) / 2**30, rel=0.1
    )
    if found.host:
        on_host = sum(found.host.values()) / 2**30
        assert float(recipe.find(r"([\d.]+) GiB of host")) == pytest.approx(on_host, rel=0.1)
    tokens = float(recipe.find(r"([\d,]+) tokens/s/GPU").replace(",", ""))
    assert tokens == pytest.approx(found.tokens_per_gpu_second, rel=0.1)
    assert recipe.find(r"bottleneck (\w+)") == found.bottleneck
