"""Prove that no file of others ends a command in a stack trace, in a hang, or without memory.

    python bench/prove/fuzz.py [--cases 400] [--seconds 20] [--target NAME] [--number N]

Good files of each kind that others may have made (tests/support/fuzzing/targets.py) are changed by
value and by byte (tests/support/fuzzing/mutations.py) and read as the product reads them.  Each
kind has a process of its own with a limit on memory, so that a library that crashes or swallows the
machine is told like everything else.  The script prints what it found and ends with 1 if there is
anything.  A case is made again by its kind and its number.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
MORE_MEMORY = 2 * 2**30
"""Bytes of address space that reading may take on top of what the imports took."""
BATCH = 20
"""Cases that are read between two looks at the clock."""


def main() -> int:
    from tests.support.fuzzing.targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=400, help="cases of each kind, at most")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds for each kind")
    names = [target.name for target in TARGETS]
    parser.add_argument("--target", choices=names, help="the only kind to attack")
    parser.add_argument("--number", type=int, help="the only case")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return attack_one(options)
    found = 0
    for target in TARGETS:
        if options.target in (None, target.name):
            found += attack_in_child(target.name, options)
    return 1 if found else 0


def attack_in_child(name: str, options: argparse.Namespace) -> int:
    """Attack one kind of file in a process of its own; return the number of findings."""
    words = [sys.executable, __file__, "--child", "--target", name]
    words += ["--cases", str(options.cases), "--seconds", str(options.seconds)]
    if options.number is not None:
        words += ["--number", str(options.number)]
    limit = 20 * options.seconds + 300
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        print(f"{name}: not done after {limit:.0f} s")
        return 1
    lines = [line for line in done.stdout.splitlines() if line.startswith("fuzz: ")]
    for line in lines:
        print(f"{name}: {line.removeprefix('fuzz: ')}", flush=True)
    if done.returncode:
        print(f"{name}: the process ended with {done.returncode}", flush=True)
        return 1
    return sum("case " in line for line in lines)


def attack_one(options: argparse.Namespace) -> int:
    """Attack one kind of file in this process, and print each finding once."""
    from tests.support.fuzzing.attack import attack
    from tests.support.fuzzing.targets import TARGETS

    (target,) = [target for target in TARGETS if target.name == options.target]
    numbers = range(options.cases)
    if options.number is not None:
        numbers = range(options.number, options.number + 1)
    limit_memory()
    begin = time.monotonic()
    counts: Counter[str] = Counter()
    first: dict[str, int] = {}
    num_cases = 0
    for start in range(numbers.start, numbers.stop, BATCH):
        batch = numbers[start - numbers.start : start - numbers.start + BATCH]
        with tempfile.TemporaryDirectory() as folder:
            print("fuzz-batch", batch, file=sys.stderr)
            for finding in attack(target, Path(folder), batch):
                counts[finding.what] += 1
                first.setdefault(finding.what, finding.number)
        num_cases += len(batch)
        if time.monotonic() - begin > options.seconds:
            break
    for what, count in counts.items():
        print(f"fuzz: case {first[what]} and {count - 1} more: {json.dumps(what)}")
    print(f"fuzz: {num_cases} hostile files in {time.monotonic() - begin:.1f} s")
    return 0


def limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MORE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


if __name__ == "__main__":
    sys.exit(main())
