"""Write docs/licenses.md: the license of every package that the project installs.

    python requirements/licenses.py

pip reads the metadata of each pinned package from the package index and installs nothing; that
takes a pip of 23.3 or newer and some minutes.  The script fails when a package has a license that
`ALLOWED` does not list for its use.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "docs" / "licenses.md"
FILES = {
    "run": ("run.txt", "build.txt"),
    "CUDA": ("torch-cuda.txt",),
    "tests only": ("test.txt",),
}
"""The files of the packages of each use; a package belongs to the first use that names it."""

PERMISSIVE = {
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "MIT",
    "MIT-CMU",
    "MPL-2.0",
    "PSF-2.0",
    "Zlib",
}
ALLOWED = {
    "run": PERMISSIVE,
    "CUDA": PERMISSIVE | {"LicenseRef-NVIDIA-Proprietary", "not stated"},
    "tests only": PERMISSIVE | {"LGPL-2.1-or-later", "LGPL-3.0-or-later"},
}
"""The licenses that a package of each use may have."""

IDENTIFIERS = (
    (r"MPL-2\.0 AND MIT", "MPL-2.0 AND MIT"),
    (r"MIT OR Apache", "MIT OR Apache-2.0"),
    (r"\bApache\b", "Apache-2.0"),
    (r"\bMIT\b", "MIT"),
    (r"3-Clause BSD|BSD[- ]3-Clause", "BSD-3-Clause"),
    (r"BSD-2-Clause", "BSD-2-Clause"),
    (r"\bBSD\b", "BSD"),
    (r"LGPL-3\.0|LGPLv3", "LGPL-3.0-or-later"),
    (r"LGPL", "LGPL-2.1-or-later"),
    (r"MPL|Mozilla", "MPL-2.0"),
    (r"\bISC\b", "ISC"),
    (r"\bPSF|Python Software Foundation", "PSF-2.0"),
    (r"NVIDIA", "LicenseRef-NVIDIA-Proprietary"),
)
"""SPDX identifiers of what packages say in free text; the first that is found counts."""

OF_LICENSE_FILES = {"openai-harmony": "Apache-2.0"}
"""The licenses of packages that have a license file, and no word on it in their metadata."""

HEAD = """# Licenses

The packages that the project installs, their pinned versions, and the licenses that their metadata
states, in SPDX's names. The project itself is under Apache-2.0. `python requirements/licenses.py`
writes this page and refuses a license that it does not list; `make sbom` writes a bill of materials
in CycloneDX's form. "CUDA" is what torch's build for GPUs brings along. Packages marked "tests
only" aren't needed to train.

| package | version | license | for |
|---|---|---|---|
"""


def main() -> None:
    uses = uses_of_packages()
    rows = []
    problems = []
    for metadata in pinned_metadata():
        name = normalized(metadata["name"])
        license_name = license_of(metadata)
        rows.append(f"| {name} | {metadata['version']} | {license_name} | {uses[name]} |\n")
        if not is_allowed(license_name, uses[name]):
            problems.append(f"{name} is under {license_name}: not in ALLOWED for {uses[name]}.")
    if problems:
        sys.exit("\n".join(problems))
    PAGE.write_text(HEAD + "".join(sorted(rows)))


def uses_of_packages() -> dict[str, str]:
    """Return the use of each package that a requirement file names."""
    uses: dict[str, str] = {}
    for use, files in FILES.items():
        for file in files:
            for name in re.findall(r"^[a-z0-9][a-z0-9._-]*", (FOLDER / file).read_text(), re.M):
                uses.setdefault(normalized(name), use)
    return uses


def pinned_metadata() -> list[dict[str, Any]]:
    """Return the metadata of all packages that this platform would install."""
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--dry-run"]
    command += ["--ignore-installed", "--no-deps", "--report", "-"]
    for files in FILES.values():
        for file in files:
            command += ["-r", str(FOLDER / file)]
    done = subprocess.run(command, stdout=subprocess.PIPE)
    if done.returncode:
        sys.exit("pip could not read the metadata: see above.")
    found = []
    for package in json.loads(done.stdout)["install"]:
        found.append(package["metadata"])
    return found


def license_of(metadata: Mapping[str, Any]) -> str:
    """Return the SPDX expression of a package, or "not stated".

    Args:
        metadata: core metadata in JSON form (PEP 566): the expression counts before the field
            `License`, and that before the classifiers.
    """
    expression = metadata.get("license_expression")
    if expression:
        return str(expression)
    classifiers = metadata.get("classifier") or []
    licenses = [line for line in classifiers if line.startswith("License :: OSI")]
    first_line = str(metadata.get("license") or "").strip().split("\n")[0]
    for text in (first_line, *licenses):
        for pattern, identifier in IDENTIFIERS:
            if re.search(pattern, text):
                return identifier
    return OF_LICENSE_FILES.get(normalized(str(metadata.get("name"))), "not stated")


def is_allowed(license_name: str, use: str) -> bool:
    """Return whether all parts of an expression are allowed, or one of alternatives."""
    alternatives = license_name.split(" OR ")
    return any(set(part.split(" AND ")) <= ALLOWED[use] for part in alternatives)


def normalized(name: str) -> str:
    """Return a package's name as PEP 503 writes it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
