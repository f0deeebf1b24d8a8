"""The house rules that no single module can keep: imports, names, and what is never used."""

from __future__ import annotations

import ast
import configparser
import functools
import gc
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import density

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "cpt").rglob("*.py"), *(ROOT / "data_pipeline").rglob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))

ROOMS = {
    "data_pipeline/escaping.py": "text from outside, made safe to show",
    "data_pipeline/errors.py": "exceptions with their exit codes",
    "data_pipeline/tables.py": "tables for terminals",
    "data_pipeline/charts.py": "figures as SVG",
    "data_pipeline/objects/": "objects of S3 as paths that open by requests",
    "data_pipeline/bounded/": "JSON and YAML of others: limits on bytes, depth, digits",
    "data_pipeline/console/": "log lines, --quiet and --verbose, progress of long commands",
    "data_pipeline/config/": "data-mix YAML -> MixConfig; the strict YAML reader",
    "data_pipeline/text/": "cleaning, language, tokenizer, the Harmony format",
    "data_pipeline/store/": "files, shards, packed rows, manifest of a build",
    "data_pipeline/engine/": "where the tasks of a build run",
    "data_pipeline/commands.py": "parser, start and end of every command line",
    "data_pipeline/reading/": "files, tables, objects -> documents",
    "data_pipeline/parts/": "documents -> parts: token shards, made once and shared by builds",
    "data_pipeline/fates/": "what becomes of each document: held out, copy, trained on",
    "data_pipeline/build/": "parts -> a build: packed rows, origins, manifest",
    "data_pipeline/dataset.py": "what training reads",
    "data_pipeline/mixture/": "(ledger, seed, step) -> rows; the data plan",
    "data_pipeline/audit/": "is the text what its labels say?",
    "data_pipeline/__main__.py": "the command line",
    "cpt/errors.py": "exceptions with their exit codes",
    "cpt/storage/": "free space, allocation, file-backed memory",
    "cpt/config/": "run YAML + DeepSpeed JSON -> RunConfig",
    "cpt/parallel/": "topology, agreement, exchanges, Ulysses, window halo",
    "cpt/deepspeed_adapter/": "everything that touches DeepSpeed's inside",
    "cpt/model/": "Hugging Face's gpt-oss, patched once; attention, experts, decoding, weights",
    "cpt/resilience/": "stop, watchdog, heartbeat, lock, planned faults",
    "cpt/checkpoint/": "flat tensors on disk: manifest, writer, reader, listing, pruning",
    "cpt/training/": "one optimizer step: engine, loader, schedule; replies to prompts",
    "cpt/telemetry/": "metrics, trackers, goodput, report",
    "cpt/guard/": "yardsticks, states, controllers, audit",
    "cpt/planning/": "memory, speed and traffic before there is a machine; mix curve",
    "cpt/offline/": "a finished model without an engine: sample, evaluate, self-replay, KL targets",
    "cpt/export/": "checkpoint -> Hugging Face, MXFP4; model card, tokenizer, merge",
    "cpt/commands/": "one file per subcommand of cpt",
    "cpt/job/": "one run: launch, assemble, loop, saving, recovery, guard levers",
    "cpt/cli.py": "the `cpt` command",
    "cpt/run.py": "started by `deepspeed`",
}
"""What each room holds, in the order data flows: a room imports only from itself and from rooms
listed before it.
"""

ORDER = list(ROOMS)

MAY_IMPORT_DEEPSPEED = "cpt/deepspeed_adapter/"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of a file; kept, since most of the tests look at all files."""
    return tuple(ast.walk(tree(path)))


@pytest.fixture(scope="module", autouse=True)
def nodes_of_these_tests() -> Iterator[None]:
    """Keep a million nodes from the garbage collector, and drop them in the end.

    It would walk all of them again and again while they become more, and in all later tests.
    """
    gc.disable()
    yield
    for kept in (calls, nodes, tree):
        kept.cache_clear()
    gc.enable()


def imported_names(path: Path) -> set[str]:
    """Return absolute names of all that a file imports; `from a import b` gives `a.b`."""
    names = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_names(path)}


def room_of(name: str) -> str | None:
    """Return the room that a dotted name belongs to."""
    path = name.replace(".", "/") + "/"
    for room in ORDER:
        if path.startswith(room.removesuffix(".py").removesuffix("/") + "/"):
            return room
    return None


def room_of_file(path: Path) -> str | None:
    """Return the room that a file of the code belongs to."""
    return room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))


PACKAGES = {ROOT / "cpt" / "__init__.py", ROOT / "data_pipeline" / "__init__.py"}
"""The files in no room."""
MODULES = [path for path in SOURCES if path not in PACKAGES]


def test_every_module_is_in_a_room() -> None:
    homeless = [relative(path) for path in MODULES if room_of_file(path) is None]
    assert homeless == [], "give them a place in ROOMS"


def test_room_imports_only_from_rooms_before_it() -> None:
    refused = []
    for path in MODULES:
        own = room_of_file(path)
        if own is None:
            continue
        for name in sorted(imported_names(path)):
            if name in ("cpt", "data_pipeline") or not name.startswith(("cpt.", "data_pipeline.")):
                continue
            room = room_of(name)
            if room is None or ORDER.index(room) > ORDER.index(own):
                refused.append(f"{relative(path)} ({own}) imports {name}")
    assert refused == []


def test_every_room_exists_and_the_readme_draws_the_same_map() -> None:
    drawn = "\n".join(f"    {room:<27}{holds}" for room, holds in ROOMS.items())
    print(drawn)
    assert [room for room in ORDER if not (ROOT / room).exists()] == []
    assert drawn in (ROOT / "README.md").read_text(encoding="utf-8"), (
        f"README's map is not this one:\n{drawn}"
    )


def importers(paths: list[Path], packages: set[str]) -> dict[str, set[str]]:
    """Return the files that import one of some packages, and which."""
    found = {}
    for path in paths:
        imported = imported_packages(path) & packages
        if imported:
            found[relative(path)] = imported
    return found


def test_data_pipeline_imports_neither_training_nor_its_libraries() -> None:
    forbidden = {"cpt", "torch", "deepspeed", "transformers", "accelerate", "flash_attn", "wandb"}
    paths = [path for path in SOURCES if path.is_relative_to(ROOT / "data_pipeline")]
    assert importers(paths, forbidden) == {}


def test_deepspeed_is_imported_in_one_room_only() -> None:
    found = importers(SOURCES, {"deepspeed"})
    assert found
    assert [path for path in found if not path.startswith(MAY_IMPORT_DEEPSPEED)] == []


def dependency_modules() -> set[str]:
    """Return the import names of the distributions in setup.cfg."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    extras = settings["options.extras_require"].values()
    listed = settings["options"]["install_requires"] + "".join(extras)
    names = re.findall(r"^\s*([A-Za-z0-9_-]+)", listed, re.MULTILINE)
    return {name.lower().replace("-", "_") for name in names} | {"yaml"}


def test_setup_cfg_names_the_dependencies_that_are_compared() -> None:
    assert {"torch", "deepspeed", "datasets", "wandb", "flash_attn"} <= dependency_modules()


def importable(folder: Path) -> list[Path]:
    """Return the modules and packages directly in a folder."""
    entries = []
    for entry in sorted(folder.iterdir()):
        if entry.suffix == ".py" or (entry.is_dir() and entry.name != "__pycache__"):
            entries.append(entry)
    return entries


def test_nothing_directly_in_cpt_shadows_another_module() -> None:
    names = {path.stem for path in importable(ROOT / "cpt")}
    assert names & (sys.stdlib_module_names | dependency_modules()) == set()


@functools.cache
def calls(path: Path) -> set[str]:
    """Return the dotted names of all that is called, such as `eval` and `model.eval`."""
    return {ast.unparse(node.func) for node in nodes(path) if isinstance(node, ast.Call)}


MAY_PRINT = {"data_pipeline/console/say.py"}
PRINTS = {"print", "sys.stdout.write", "sys.stderr.write"}


def test_what_is_printed_goes_through_the_module_that_escapes_it() -> None:
    printing = {relative(path) for path in SOURCES if calls(path) & PRINTS}
    assert printing == MAY_PRINT, "say() and complain() make texts safe to show"


KNOWS_OPCODES = "cpt/checkpoint/inert_pickle.py"
PICKLES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
RUNS_TEXT = {"eval", "exec", "compile", "torch.load", "yaml.load", "yaml.unsafe_load"}


def names_from_pickle(path: Path) -> set[str]:
    """Return every `name` that a file uses as `pickle.name`."""
    used = set()
    for node in nodes(path):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Name) and node.value.id == "pickle":
            used.add(node.attr)
    return used


@pytest.mark.case("X1", "no pickle, torch.load, eval or exec in the code")
def test_no_pickle_is_read_and_no_text_becomes_code() -> None:
    found = {}
    for path in SOURCES:
        dangerous = (imported_packages(path) & PICKLES) | (calls(path) & RUNS_TEXT)
        if relative(path) == KNOWS_OPCODES:
            dangerous -= {"pickle"}
            for name in names_from_pickle(path):
                assert isinstance(getattr(pickle, name), bytes), "only the numbers of opcodes"
        if "allow_pickle=True" in path.read_text(encoding="utf-8"):
            dangerous.add("allow_pickle=True")
        if dangerous:
            found[relative(path)] = dangerous
    assert found == {}


LOADER_WORDS = re.compile(r"from_pretrained|\bAuto[A-Z]|\bpipeline\(")


def test_no_loader_of_transformers_chooses_a_class_by_what_a_directory_says() -> None:
    """tests/commands/test_model_directory.py tries the holes that such loaders have."""
    found = {}
    for path in SOURCES:
        if not LOADER_WORDS.search(path.read_text(encoding="utf-8")):
            continue  # parsing all files again takes seconds
        loaders = []
        for name in calls(path):
            last = name.rpartition(".")[2]
            if last == "from_pretrained" or name.startswith("Auto") or last == "pipeline":
                loaders.append(name)
        if loaders:
            found[relative(path)] = loaders
    assert found == {}


def test_code_is_ascii() -> None:
    found = []
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.isascii():
                found.append(f"{relative(path)}:{number}")
    assert found == []


SHIPPED = [
    *SOURCES,
    *TESTS,
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "ds_configs").rglob("*.json")),
    ROOT / "setup.cfg",
]


def test_no_path_of_one_machine_is_written_down() -> None:
    folders = "work|home|root|Users|mnt|scratch|workspace"
    found = {}
    for path in SHIPPED:
        text = path.read_text(encoding="utf-8")
        names = re.findall(rf"[\"'\s=](/(?:{folders})/[\w./-]*)", text)
        if names:
            found[relative(path)] = names
    assert found == {}


def test_no_two_classes_have_the_same_name() -> None:
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(relative(path))
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


def test_lines_carry_no_more_than_those_of_comparable_projects() -> None:
    """`python -m tests.support.density` prints the figures."""
    found = density.measure([str(ROOT / "cpt"), str(ROOT / "data_pipeline")])
    above = {}
    for kind, bound in density.MAX_PER_1000.items():
        if found.per_1000(kind) > bound:
            above[kind] = found.per_1000(kind)
    assert above == {}, f"per 1,000 statements, at most {density.MAX_PER_1000}"
    assert found.long_lines_percent() <= density.MAX_LONG_LINES_PERCENT


def has_no_docstring(path: Path) -> bool:
    module = tree(path)
    return bool(module.body) and not ast.get_docstring(module)


def test_module_says_what_it_owns() -> None:
    assert [relative(path) for path in SOURCES if has_no_docstring(path)] == []


TEST_MODULES = [path for path in TESTS if path.name.startswith("test_")]


def test_test_module_says_what_it_promises() -> None:
    assert [relative(path) for path in TEST_MODULES if has_no_docstring(path)] == []


def test_data_tests_need_neither_training_nor_its_libraries() -> None:
    paths = [path for path in TESTS if path.is_relative_to(ROOT / "tests" / "data_pipeline")]
    assert importers(paths, {"cpt", "torch", "deepspeed", "transformers"}) == {}


def test_tests_that_start_several_processes_are_marked() -> None:
    unmarked = []
    for path in TEST_MODULES:
        if path.parent != ROOT / "tests" / "dist":
            continue
        marks = ""
        for node in tree(path).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
                marks = ast.unparse(node.value)
        if not re.search(r"pytest\.mark\.dist\b", marks):
            unmarked.append(relative(path))
    assert unmarked == []


def test_support_holds_no_tests() -> None:
    found = []
    for path in TESTS:
        if path.parent != ROOT / "tests" / "support":
            continue
        names = [path.name]
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                names.append(node.name)
        if any(name.startswith("test_") for name in names):
            found.append(relative(path))
    assert found == []


def test_tests_are_no_package() -> None:
    """pytest imports them by path (importlib mode), and a package would make second copies."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_test_hides_another_of_the_same_name() -> None:
    hidden = []
    for path in TEST_MODULES:
        counts: Counter[str] = Counter()
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                counts[node.name] += 1
        for name, count in counts.items():
            if count > 1:
                hidden.append(f"{relative(path)}: {name}")
    assert hidden == []


READERS = ("open_regular", "read_small_file", "read_small_text", "read_json", "read_yaml")
ROOMS_OF_RUN_DIRECTORIES = ("guard", "job", "resilience", "checkpoint", "telemetry")
READS_WHAT_A_RUN_NAMES = {"cpt/telemetry/report/panel.py", "cpt/checkpoint/lineage.py"}
"""Files that read what lies outside of the run directory: the mix, and the model.

The files of a model in the cache of Hugging Face are links.
"""


@pytest.mark.parametrize("room", ROOMS_OF_RUN_DIRECTORIES)
def test_files_of_a_run_directory_are_read_without_following_links(room: str) -> None:
    """A link that another user has put there could lead to any file of whoever reads."""
    following = []
    num_calls = 0
    for path in sorted((ROOT / "cpt" / room).rglob("*.py")):
        for node in nodes(path):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) not in READERS:
                continue
            num_calls += 1
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if (
                words.get("follow_links") != "False"
                and relative(path) not in READS_WHAT_A_RUN_NAMES
            ):
                following.append(f"{relative(path)}:{node.lineno}")
    assert num_calls > 0
    assert following == []
