"""What fails beside training costs one warning in plain words, and nothing else."""

from __future__ import annotations

import pytest

from cpt.errors import StorageError
from cpt.resilience.best_effort import best_effort, reason_of


def test_error_of_the_block_is_one_warning_without_a_stack_trace(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with best_effort("The picture is not drawn"):
        raise OSError(28, "No space left on device", "run/report.html")
    (record,) = caplog.records
    assert record.getMessage() == (
        "The picture is not drawn: run/report.html: No space left on device. Training is not "
        "affected."
    )
    assert record.exc_info is None


def test_block_without_an_error_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    done = []
    with best_effort("The picture is not drawn"):
        done.append(1)
    assert done == [1] and not caplog.records


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_request_to_leave_is_no_failure(error: type[BaseException]) -> None:
    with pytest.raises(error), best_effort("The picture is not drawn"):
        raise error


def test_reason_is_one_line() -> None:
    assert reason_of(ValueError("first\nsecond")) == "ValueError: first"
    assert reason_of(BrokenPipeError(32, "Broken pipe")) == "Broken pipe"
    assert reason_of(TimeoutError()) == "TimeoutError"
    assert reason_of(StorageError("run/report.html: Is a directory.")) == (
        "run/report.html: Is a directory"
    )
