"""constraints.txt, the hashed requirement files, setup.cfg and docs/licenses.md agree."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from requirements.licenses import is_allowed, license_of, normalized, uses_of_packages

ROOT = Path(__file__).resolve().parents[2]
HASHED = ("build.txt", "run.txt", "test.txt", "torch-cpu.txt", "torch-cuda.txt", "release.txt")
OF_THE_SET = ("run.txt", "test.txt", "torch-cuda.txt")
"""The hashed files whose versions constraints.txt lists."""


def versions(file: Path) -> dict[str, set[str]]:
    """Return the versions of each package of a requirement file; markers may split one."""
    found: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;\\]+)", file.read_text(), re.MULTILINE):
        found.setdefault(normalized(name), set()).add(version)
    return found


def requirements_of(extra: str | None) -> list[Requirement]:
    """Return what setup.cfg asks for; of no extra if `extra` is None."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    if extra is None:
        text = settings["options"]["install_requires"]
    else:
        text = settings["options.extras_require"][extra]
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [Requirement(line) for line in lines]


def test_constraints_and_hashes_name_the_same_versions() -> None:
    of_the_set: dict[str, set[str]] = {}
    for file in OF_THE_SET:
        of_the_set.update(versions(ROOT / "requirements" / file))
    assert versions(ROOT / "constraints.txt") == of_the_set


@pytest.mark.parametrize("file", HASHED)
def test_every_package_has_hashes(file: str) -> None:
    blocks = re.split(r"\n(?=\w)", (ROOT / "requirements" / file).read_text())
    packages = [block for block in blocks if not block.startswith("#")]
    assert packages
    assert [block.split()[0] for block in packages if "--hash=sha256:" not in block] == []


@pytest.mark.parametrize(
    ("file", "extras"),
    [("run.txt", (None, "tensorboard")), ("test.txt", (None, "test", "tensorboard", "evaluate"))],
    ids=["run", "test"],
)
def test_hashed_files_hold_what_setup_cfg_asks_for(
    file: str, extras: tuple[str | None, ...]
) -> None:
    pinned = versions(ROOT / "requirements" / file)
    pinned["torch"] = versions(ROOT / "requirements" / "torch-cuda.txt")["torch"]
    for extra in extras:
        for requirement in requirements_of(extra):
            found = pinned.get(normalized(requirement.name), set())
            assert found, f"{file} lacks {requirement.name}: run requirements/pin.py"
            assert all(requirement.specifier.contains(version) for version in found), requirement


def test_both_builds_of_torch_have_one_version() -> None:
    (cpu,) = versions(ROOT / "requirements" / "torch-cpu.txt")["torch"]
    (cuda,) = versions(ROOT / "requirements" / "torch-cuda.txt")["torch"]
    assert cpu == f"{cuda}+cpu"


def test_nothing_that_an_installed_package_needs_is_left_out() -> None:
    """pip installs these files without dependencies, so each must be complete in itself."""
    pinned = {*versions(ROOT / "requirements" / "test.txt"), "torch"}
    pinned |= set(versions(ROOT / "requirements" / "build.txt"))
    missing = set()
    for name in pinned:
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, needed):
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and normalized(requirement.name) not in pinned:
                missing.add(requirement.name)
    assert missing == set()


def license_rows() -> dict[str, tuple[str, str, str]]:
    """Return version, license and use of each package of docs/licenses.md."""
    rows = {}
    for line in (ROOT / "docs" / "licenses.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 6 and re.match(r"[a-z0-9]", cells[1]) and cells[1] != "package":
            rows[cells[1]] = (cells[2], cells[3], cells[4])
    return rows


def test_every_pinned_package_has_an_allowed_license() -> None:
    rows = license_rows()
    uses = uses_of_packages()
    assert len(rows) > 100
    for name, (_, license_name, use) in rows.items():
        assert use == uses[name]
        assert is_allowed(license_name, use), f"{name}: {license_name}"
    # what only other platforms or newer Pythons install is not in the table
    other_platforms = {"fasttext-predict-v2", "httpx2-jsfetch"}
    assert set(uses) - set(rows) <= other_platforms


def test_licenses_are_those_that_the_installed_packages_state() -> None:
    compared = 0
    for name, (version, license_name, _) in license_rows().items():
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.version == version:
            assert license_of(installed.metadata.json) == license_name, name
            compared += 1
    assert compared > 50


def test_ci_names_actions_by_commit_and_may_only_read() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert workflows
    for path in workflows:
        text = path.read_text()
        actions = re.findall(r"uses: (\S+)", text)
        assert actions
        assert [name for name in actions if not re.fullmatch(r".+@[0-9a-f]{40}", name)] == []
        assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
        assert "secrets." not in text and "pull_request_target" not in text
