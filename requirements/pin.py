"""Write constraints.txt and the hashed requirement files of this folder in one go.

    pip install uv
    python requirements/pin.py              # new packages are added, pinned versions stay
    python requirements/pin.py --upgrade    # the newest versions that setup.cfg allows

uv resolves setup.cfg for all platforms and all Pythons from 3.11 on.  constraints.txt gets the
versions, the files of this folder the versions and the SHA-256 of every file that the package
index lists for them:

    build.txt       what builds the packages that are published as source
    run.txt         what `pip install gpt-oss-cpt[tensorboard]` needs, but for torch
    test.txt        run.txt, and what `make check` and `make test` need
    torch-cpu.txt   torch's build for CPUs, which lies on an index of its own
    torch-cuda.txt  torch's wheel of the package index, and the libraries of CUDA that it needs
    release.txt     the tools of `make sbom` and `make audit`

torch stands in files of its own because pip prefers the file whose hash its index tells: where
both builds are offered it would take the one for CUDA, whatever the machine.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RELEASE = ("cyclonedx-bom", "pip-audit")
OF_CUDA = re.compile(r"(nvidia|cuda|triton)(-|$)")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

# The wheels torch-VERSION+cpu of Linux for CPython 3.11 to 3.14, first x86_64 and then aarch64.
# The first was computed from the file; the others were compared in two public lists.
CPU_BUILDS = {
    "2.13.0": (
        "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
        "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
        "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
        "d20fa53ee744502fa4c69818a720b05ca0d37abd055d4f6e66cae155114bc691",
        "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
        "6f307c2c32d764ffc6ff6893b801fad6d4752f3e67966cb8abf1843427c02604",
        "0b8f7d0423027ae8b90c7977c627f3379f325363a08224dffad9b4b2d684a83d",
        "ca021f9eb2f8345c83fa03e3a04587308afb8df71bd472670b3ece00df58621c",
    )
}
NOTE = "# requirements/pin.py writes this file.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Pin versions and hashes.")
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    upgrade = parser.parse_args().upgrade
    # one resolution of everything, so that all files agree
    extras = ("test", "tensorboard", "evaluate")
    everything = resolved(project_requirements(extras), ROOT / "constraints.txt", upgrade)
    (ROOT / "constraints.txt").write_text(NOTE + "".join(map(without_hashes, everything.values())))
    release = resolved("\n".join(RELEASE), FOLDER / "release.txt", upgrade)
    run = resolved(project_requirements(("tensorboard",)), ROOT / "constraints.txt", False)
    torch = resolved("torch", ROOT / "constraints.txt", False)
    of_torch = {name for name in torch if name == "torch" or OF_CUDA.match(name)}
    write("build.txt", everything, {"setuptools"})
    write("release.txt", release, set(release))
    write("run.txt", everything, set(run) - of_torch)
    # the kernels' tests compile with Triton, on CPUs as well
    write("test.txt", everything, set(everything) - of_torch | {"triton"})
    write("torch-cuda.txt", everything, of_torch)
    (FOLDER / "torch-cpu.txt").write_text(NOTE + cpu_build(everything["torch"]))


def project_requirements(extras: tuple[str, ...]) -> str:
    """Return the project's requirements, one a line, as uv reads them from setup.cfg."""
    names = ",".join(extras)
    return f"gpt-oss-cpt[{names}] @ {ROOT.as_uri()}"


def resolved(requirements: str, pinned: Path, upgrade: bool) -> dict[str, str]:
    """Return the lines of each package, hashes included, keyed by its normalized name.

    Args:
        requirements: one requirement a line.
        pinned: a file of versions that stay, unless `upgrade` is set.
        upgrade: take the newest versions.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder, "wanted.in")
        wanted.write_text(requirements + "\n")
        out = Path(folder, "out.txt")
        if pinned.exists() and not upgrade:
            out.write_text(pinned.read_text())
        command = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
        command += ["--generate-hashes", "--no-header", "--no-annotate"]
        command += ["--no-emit-package", "gpt-oss-cpt", "--output-file", str(out), str(wanted)]
        if subprocess.run(command).returncode:
            sys.exit("uv could not resolve the requirements: see above.")
        return blocks(out.read_text())


def blocks(text: str) -> dict[str, str]:
    """Split a requirement file into packages; one may have several versions, by its markers."""
    parts: dict[str, str] = {}
    name = ""
    for line in text.splitlines(keepends=True):
        found = NAME.match(line)
        if found:
            name = found.group()
        if name and not line.startswith("#"):
            parts[name] = parts.get(name, "") + line
    return parts


def without_hashes(block: str) -> str:
    """Return the lines of a package that name a version."""
    lines = [line.rstrip(" \\\n") for line in block.splitlines() if NAME.match(line)]
    return "\n".join(lines) + "\n"


def write(file: str, packages: dict[str, str], names: set[str]) -> None:
    text = NOTE
    for name in sorted(names):
        text += packages[name]
    (FOLDER / file).write_text(text)


def cpu_build(block: str) -> str:
    """Return the lines of torch's build for CPUs, of the version that `block` names."""
    version = block.split()[0].removeprefix("torch==")
    if version not in CPU_BUILDS:
        sys.exit(f"CPU_BUILDS in {__file__} lacks torch {version}: add the hashes of its wheels.")
    lines = [f"torch=={version}+cpu"]
    for digest in CPU_BUILDS[version]:
        lines.append(f"    --hash=sha256:{digest}")
    return " \\\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
