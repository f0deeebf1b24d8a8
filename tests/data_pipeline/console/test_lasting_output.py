"""Output that cannot be written neither ends a program nor changes its exit code."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest

from data_pipeline.console.lasting_output import make_output_lasting

PROGRAM = """
import logging, os, sys
from data_pipeline.console.lasting_output import make_output_lasting
if sys.argv[1] == "lasting":
    make_output_lasting()
logging.basicConfig(level=logging.INFO)
for number in range(3):
    logging.info("logged")
    print("printed", flush=True)
    print("written", file=sys.stderr)
sys.exit(int(sys.argv[2]))
"""


def exit_code(kind: str, code: int, output: int) -> int:
    command = [sys.executable, "-c", PROGRAM, kind, str(code)]
    environment = dict(os.environ)
    environment.pop("PYTHONUNBUFFERED", None)  # Python hides some failures then
    return subprocess.run(command, stdout=output, stderr=output, env=environment).returncode


@pytest.mark.parametrize("code", [0, 75])
@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_output_that_cannot_be_written_changes_no_exit_code(kind: str, code: int) -> None:
    if kind == "full disk":
        output = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, output = os.pipe()
        os.close(reader)
    try:
        assert exit_code("plain", code, output) not in (0, 75)  # what Python does by itself
        assert exit_code("lasting", code, output) == code
    finally:
        os.close(output)


def test_full_pipe_that_does_not_block_changes_no_exit_code() -> None:
    reader, output = os.pipe()
    os.set_blocking(output, False)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(output, bytes(4096))
        assert exit_code("plain", 0, output) not in (0, 75)
        assert exit_code("lasting", 0, output) == 0
    finally:
        os.close(reader)
        os.close(output)


def test_output_arrives_where_it_can_be_written() -> None:
    command = [sys.executable, "-c", PROGRAM, "lasting", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "printed\n" * 3
    assert done.stderr == "INFO:root:logged\nwritten\n" * 3


def test_stream_in_memory_stays_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    stream = sys.stdout
    make_output_lasting()
    assert sys.stdout is stream
    print("kept")
    assert capsys.readouterr().out == "kept\n"
