"""The house rules that no single module can keep: who imports whom, what a module may be called, what is never used."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "cpt").rglob("*.py"), *(ROOT / "data_pipeline").rglob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))

FLOORS = (
    "cpt.errors",
    "cpt.resilience.faults",
    "cpt.config",
    "cpt.storage.file_memory",
    "cpt.deepspeed_adapter.internals",
    "cpt.parallel",
    "cpt.model",
    "cpt.training",
    "cpt.state",
    "cpt.telemetry",
    "cpt.guard",
    "cpt.release",
    "cpt.planning.memory",
    "cpt.job.memory_report",
    "cpt.planning",
    "cpt.commands.doctor",
    "cpt.job.progress",
    "cpt.job.data",
    "cpt.job.job",
    "cpt.job.run_dir",
    "cpt.job.saving",
    "cpt.job.recovery",
    "cpt.job.guard_levers",
    "cpt.job.samples",
    "cpt.job.loop",
    "cpt.job.launch",
    "cpt.offline.sampling",
    "cpt.offline.evaluation",
    "cpt.offline.self_replay",
    "cpt.offline.kl_target_writer",
    "cpt.cli",
    "cpt.run",
)
"""Rooms of cpt/ in the order data flows; a room imports only from itself and from those before it."""

MAY_IMPORT_DEEPSPEED = {"cpt/deepspeed_adapter/internals.py"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_names(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth; `from a import b` gives `a.b`."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


def floor_of(name: str) -> int | None:
    found = [index for index, room in enumerate(FLOORS) if name == room or name.startswith(room + ".")]
    return found[0] if found else None


def by_path(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=relative)


CPT_MODULES = [path for path in SOURCES if path.is_relative_to(ROOT / "cpt") and path != ROOT / "cpt" / "__init__.py"]


@by_path(CPT_MODULES)
def test_room_imports_only_from_rooms_above_it(path: Path) -> None:
    own = floor_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert own is not None, f"{relative(path)} is in no room: give it a place in FLOORS"
    inside = {name for name in imported_names(path) if name.startswith("cpt.")}
    strange = {name for name in inside if floor_of(name) is None}
    below = {name for name in inside - strange if floor_of(name) > own}
    assert not strange | below, f"{relative(path)} ({FLOORS[own]}) imports {sorted(strange | below)}"


@by_path([path for path in SOURCES if path.is_relative_to(ROOT / "data_pipeline")])
def test_data_pipeline_imports_neither_training_nor_its_libraries(path: Path) -> None:
    forbidden = {"cpt", "torch", "deepspeed", "transformers", "accelerate", "flash_attn", "wandb"}
    assert not imported_packages(path) & forbidden


@by_path(SOURCES)
def test_deepspeed_is_imported_in_one_file_only(path: Path) -> None:
    assert "deepspeed" not in imported_packages(path) or relative(path) in MAY_IMPORT_DEEPSPEED


def dependency_modules() -> set[str]:
    """Import names of the distributions in setup.cfg."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    listed = settings["options"]["install_requires"] + "".join(settings["options.extras_require"].values())
    names = {match.group() for line in listed.splitlines() if (match := re.match(r"[A-Za-z0-9_-]+", line.strip()))}
    return {name.lower().replace("-", "_") for name in names} | {"yaml"}


def test_setup_cfg_names_the_dependencies_that_are_compared() -> None:
    assert {"torch", "deepspeed", "datasets", "wandb", "flash_attn"} <= dependency_modules()


@by_path(sorted(entry for entry in (ROOT / "cpt").iterdir() if entry.is_dir() or entry.suffix == ".py"))
def test_nothing_directly_in_cpt_shadows_another_module(path: Path) -> None:
    assert path.stem == "__pycache__" or path.stem not in sys.stdlib_module_names | dependency_modules()


def calls(path: Path) -> set[str]:
    """Dotted names of everything called by name: `eval`, `torch.load`; `model.eval` is `model.eval`."""
    return {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}


MAY_UNPICKLE = "cpt/checkpoint/metadata.py"


def is_pickle(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "pickle"


@by_path(SOURCES)
@pytest.mark.case("X1", "no pickle, torch.load, eval or exec in the code")
def test_no_pickle_is_read_and_no_text_becomes_code(path: Path) -> None:
    modules = imported_packages(path) & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    if relative(path) == MAY_UNPICKLE:
        modules -= {"pickle"}
        used = {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute) and is_pickle(node.value)}
        assert used == {"Unpickler"}, "only as the base of the class that refuses what it does not know"
    called = calls(path) & {"eval", "exec", "compile", "torch.load", "yaml.load", "yaml.unsafe_load"}
    unpickles = "allow_pickle=True" in path.read_text(encoding="utf-8")
    assert not modules and not called and not unpickles, (modules, called)


@by_path(SOURCES)
@pytest.mark.case("X3", "trust_remote_code appears nowhere in the code")
def test_code_from_a_model_directory_can_not_be_trusted(path: Path) -> None:
    assert "trust_remote_code" not in path.read_text(encoding="utf-8")


@by_path(SOURCES)
def test_code_is_ascii(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [number for number, line in enumerate(lines, 1) if not line.isascii()]
    assert not found, f"{relative(path)}: lines {found[:5]}"


SHIPPED = [
    *SOURCES,
    *TESTS,
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "ds_configs").rglob("*.json")),
    ROOT / "setup.cfg",
]


@by_path(SHIPPED)
def test_no_path_of_one_machine_is_written_down(path: Path) -> None:
    folders = "work|home|root|Users|mnt|scratch|workspace"
    found = re.findall(rf"[\"'\s=](/(?:{folders})/[\w./-]*)", path.read_text(encoding="utf-8"))
    assert not found, f"{relative(path)} names {found}"


@by_path([path for path in SOURCES if path.read_text(encoding="utf-8").strip()])
def test_module_says_what_it_owns(path: Path) -> None:
    assert ast.get_docstring(tree(path))


TEST_MODULES = [path for path in TESTS if path.name.startswith("test_")]


@by_path(TEST_MODULES)
def test_test_module_says_what_it_promises(path: Path) -> None:
    assert ast.get_docstring(tree(path))


@by_path([path for path in TESTS if path.parent == ROOT / "tests" / "data"])
def test_data_tests_need_neither_training_nor_its_libraries(path: Path) -> None:
    assert not imported_packages(path) & {"cpt", "torch", "deepspeed", "transformers"}


@by_path([path for path in TEST_MODULES if path.parent == ROOT / "tests" / "dist"])
def test_tests_that_start_several_processes_are_marked(path: Path) -> None:
    marks = [
        node
        for node in tree(path).body
        if isinstance(node, ast.Assign) and "pytestmark" in map(ast.unparse, node.targets)
    ]
    assert any("pytest.mark.dist" in map(ast.unparse, ast.walk(mark.value)) for mark in marks)


@by_path([path for path in TESTS if path.parent == ROOT / "tests" / "support"])
def test_support_holds_no_tests(path: Path) -> None:
    functions = [node.name for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    assert not [name for name in functions if name.startswith("test_")] and not path.name.startswith("test_")


def test_tests_are_no_package() -> None:
    """pytest imports them by path (importlib mode); a package would make second copies."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


@by_path(TEST_MODULES)
def test_no_test_hides_another_of_the_same_name(path: Path) -> None:
    names = [node.name for node in tree(path).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(names) == len(set(names)), {name for name in names if names.count(name) > 1}
