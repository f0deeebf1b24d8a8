"""A build of very many parts keeps few files open (F1)."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_pipeline.inputs import write_jsonl

ROOT = Path(__file__).parents[3]
CODE = """
import resource, sys
from pathlib import Path
max_open, num_parts, mix, out = int(sys.argv[1]), int(sys.argv[2]), *map(Path, sys.argv[3:])
resource.setrlimit(resource.RLIMIT_NOFILE, (max_open, max_open))
from data_pipeline.reading import units
units.MIN_UNIT_BYTES = 2000  # more than a file has
units.MAX_UNITS = 1 << 20  # no source is a large one, whose small files are gathered
from data_pipeline.build.build import build
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
if __name__ == "__main__":
    mix = load_mix(mix)
    manifest = build(mix, out, progress=False, workers=2)
    built = BuiltData.open(out, mix=mix)
    assert len(list(out.rglob("*.tokens"))) == num_parts
    for row in range(0, built.num_rows(0), 7):
        built.read_row(0, row)
    print(manifest.hash)
"""


@pytest.mark.parametrize(
    ("num_parts", "max_open"),
    [(200, 96), pytest.param(1100, 256, marks=pytest.mark.slow)],
)
def test_parts_may_be_more_than_files_that_may_be_open(
    tmp_path: Path, num_parts: int, max_open: int
) -> None:
    generator = random.Random(5)  # texts that repeat nothing: held-out text is in none of them
    for number in range(num_parts):
        text = " ".join(f"{generator.getrandbits(20):x}" for _ in range(100))
        path = tmp_path / "in" / f"en-{number:05d}.jsonl"
        write_jsonl(path, [text])
    mix = tmp_path / "in" / "mix.yaml"
    mix.write_text(
        "seq_len: 1024\nseed: 1\nnear_duplicates: 0.8\ndecontaminate_tokens: 50\n"
        "sources: [{name: en, language: en, domain: web, path: en-*.jsonl, weight: 1.0, "
        "held_out_share: 0.1}]\n"
    )
    main = tmp_path / "main.py"
    main.write_text(CODE)
    done = subprocess.run(
        [sys.executable, main, str(max_open), str(num_parts), mix, tmp_path / "out"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
