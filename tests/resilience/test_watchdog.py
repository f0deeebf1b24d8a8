"""What another rank's end looks like from here is not taken for a fault of this rank."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from cpt.errors import ConfigError, cause_and_code
from cpt.resilience.environment import node_name, ranks_of_node
from cpt.resilience.watchdog import Ruling, is_lost_peer


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:4"),
        RuntimeError("Application timeout caused pair closure. Connection reset by peer"),
        RuntimeError("ncclRemoteError: a network error or a remote process exiting prematurely."),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        ConnectionResetError(104, "Connection reset by peer"),
    ],
)
def test_error_of_a_lost_connection_waits_for_its_cause(error: Exception) -> None:
    assert is_lost_peer(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA out of memory"), ValueError("Broken pipe"), ConfigError("Broken pipe")],
)
def test_own_error_does_not(error: Exception) -> None:
    assert not is_lost_peer(error)


def test_ruling_names_who_is_to_blame() -> None:
    hung = Ruling(kind="hung", rank=0, code=71, text="", wake={"12": ("h", 1), "9": ("h", 2)})
    assert hung.to_blame() == 9
    assert Ruling(kind="hung", rank=0, code=71, text="").to_blame() is None
    assert Ruling(kind="killed", rank=5, code=137, text="").to_blame() == 5
    assert Ruling.load(hung.dump()) == Ruling(
        kind="hung", rank=0, code=71, text="", wake={"12": ["h", 1], "9": ["h", 2]}
    )


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, range(4, 8)),
        ({"RANK": "1", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, range(2)),
        ({"RANK": "3"}, range(3, 4)),
    ],
)
def test_ranks_of_a_node_are_consecutive(variables: dict[str, str], ranks: range) -> None:
    assert ranks_of_node(variables) == ranks


def test_node_has_the_batch_systems_name() -> None:
    assert node_name({"SLURMD_NODENAME": "gpu-7"}) == "gpu-7"
    assert node_name({}) != ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("wrong"), 78, "wrong"),
        (PermissionError(13, "Permission denied", "/data/x"), 74, "/data/x: Permission denied."),
        (OSError(104, "Connection reset by peer"), 70, "ConnectionResetError: [Errno 104]"),
        (OSError(28, "No space left on device"), 74, "storage: No space left on device. Free"),
        (TimeoutError(110, "Connection timed out"), 70, "TimeoutError: [Errno 110]"),
        (RuntimeError("one\ntwo"), 70, "RuntimeError: one"),
    ],
)
def test_error_of_a_run_has_the_code_that_a_command_gives_it(error, code: int, words: str) -> None:
    cause, found = cause_and_code(error)
    assert found == code and cause.startswith(words) and "\n" not in cause
