"""An error of one rank is raised on the others as the same class, and nothing else is built."""

from __future__ import annotations

import json

import pytest

from cpt import errors
from cpt.errors import (
    ConfigError,
    CptError,
    DataError,
    EvaluationFailed,
    InternalError,
    StorageError,
)
from cpt.parallel.agreement import as_storage_error, describe_error, rebuild_error

CLASSES = sorted(
    {value for value in vars(errors).values() if isinstance(value, type)} - {CptError},
    key=lambda error_class: error_class.__name__,
)


def sent(error: Exception, rank: int = 3) -> CptError:
    """Return what another rank raises, after the way through JSON."""
    return rebuild_error(json.loads(json.dumps(describe_error(error))), rank)


@pytest.mark.parametrize("error_class", CLASSES, ids=lambda error_class: error_class.__name__)
def test_error_keeps_its_class_text_and_exit_code(error_class: type[CptError]) -> None:
    rebuilt = sent(error_class("mix.yaml:3: weight is -1."))
    assert type(rebuilt) is error_class
    assert str(rebuilt) == "mix.yaml:3: weight is -1."
    assert rebuilt.exit_code == error_class.exit_code


def test_evaluation_that_failed_does_not_come_back_as_a_data_error() -> None:
    assert EvaluationFailed.exit_code == DataError.exit_code
    assert type(sent(EvaluationFailed("lost 3 %"))) is EvaluationFailed


def test_all_problems_of_a_configuration_arrive() -> None:
    assert str(sent(ConfigError(["first", "second"]))) == "first\nsecond"


@pytest.mark.parametrize("name", ["", "SystemExit", "Exception", "CptError", "os.system"])
def test_name_that_is_no_error_of_this_project_becomes_an_internal_error(name: str) -> None:
    rebuilt = rebuild_error({"class": name, "text": "boom"}, 3)
    assert type(rebuilt) is InternalError and str(rebuilt) == "rank 3: boom"


def test_foreign_error_names_its_class_and_rank() -> None:
    assert str(sent(RuntimeError("no such kernel"))) == "rank 3: RuntimeError: no such kernel"


def test_full_disk_of_one_rank_ends_all_with_the_code_of_storage() -> None:
    full = OSError(28, "No space left on device", "run/rollbacks.json")
    own = as_storage_error(full)
    for error in (own, rebuild_error(describe_error(own), 0)):
        assert type(error) is StorageError
        assert str(error).startswith("run/rollbacks.json: No space left on device")
