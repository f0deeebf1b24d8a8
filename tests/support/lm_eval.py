"""lm-evaluation-harness in tests: the test extra installs it."""

from __future__ import annotations

import importlib.util
import os

import pytest


def require_lm_eval() -> None:
    """Skip the test in an environment without lm-eval; fail it in CI, which installs it."""
    if importlib.util.find_spec("lm_eval") is None:
        reason = "lm-eval is not installed. make install installs the test extra"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
