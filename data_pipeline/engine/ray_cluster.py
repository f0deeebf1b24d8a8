"""Tasks on a Ray cluster that the environment names.

Decisions
    Ray is imported when a user asks for it, and never started from here: slurm/prepare_data.sbatch
    starts it over the nodes of a job. On one machine local processes do the same.
    Who reaches an unprotected cluster runs code as its owner, so a cluster without a token is used
    only if the environment says so.
    Every node must see the work directory and the cache, and have the same code: each is asked
    before work begins.
    A task whose worker or node is lost runs again elsewhere. One that raised does not: its error
    arrives as it was raised.
    As on one machine, few tasks per worker are submitted at once, and a result is dropped once it
    is taken.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.engine.executor import TASK_MEMORY_BYTES, Executor, Item, Result
from data_pipeline.engine.local import SUBMITTED_PER_WORKER
from data_pipeline.errors import ConfigError, CptError, StorageError
from data_pipeline.store.descriptors import raise_descriptor_limit

log = logging.getLogger(__name__)

ADDRESS_VARIABLE = "RAY_ADDRESS"
MODE_VARIABLE = "RAY_AUTH_MODE"
NODES_VARIABLE = "CPT_RAY_NODES"
"""Number of nodes to wait for, if whoever has started Ray says so."""
MAX_RETRIES = 3
"""Times that a task is started again because its worker or node was lost."""
_ADDRESS = re.compile(r"([\w.-]+|\[[\da-fA-F:.]+\]):\d+")
_START_SECONDS = 300
"""Time in which all nodes must have come."""
_CHECK_SECONDS = 120
"""Time in which every node must answer before work begins."""
_LOOK_SECONDS = 60
"""Time without a finished task after which the state of the cluster is looked at."""
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a line of advice at every start
}
"""Environment that is set before Ray is imported."""


class RayExecutor(Executor):
    """Runs tasks on the workers of a Ray cluster."""

    def __init__(
        self, work_dir: Path, max_workers: int | None = None, cache_dir: Path | None = None
    ) -> None:
        """Connect to the cluster of the environment, and check its nodes.

        Args:
            work_dir: Folder of the build in progress, which every node must see.
            max_workers: Tasks that may run at once; None is as many as the cluster has CPUs.
            cache_dir: Folder of the parts that builds share, which every node must see; None for
                none.

        Raises:
            ConfigError: there is no cluster, it is not protected, or its nodes do not fit.
        """
        check_environment()
        address = os.environ[ADDRESS_VARIABLE]
        if os.environ[MODE_VARIABLE] == "disabled":
            log.warning(
                "%s=disabled: whoever reaches a port of this Ray cluster runs code as this user.",
                MODE_VARIABLE,
            )
        self._ray = _import_ray()
        self._connect(address)
        try:
            nodes = self._wait_for_nodes()
            self._check_nodes(nodes, work_dir, cache_dir)
        except BaseException:
            self.close()
            raise
        num_cpus = int(sum(node.num_cpus for node in nodes))
        self.num_workers = min(num_cpus, max_workers or num_cpus)
        self._max_submitted = max_workers or SUBMITTED_PER_WORKER * num_cpus
        log.info("Ray cluster %s: %d nodes, %d CPUs", address, len(nodes), num_cpus)

    def run(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
    ) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) of each item as it is done; see `Executor`."""
        self._check_memory()
        task = self._ray.remote(_run_task).options(
            num_cpus=1, memory=TASK_MEMORY_BYTES, max_retries=MAX_RETRIES, name=_name_of(work)
        )
        submit = functools.partial(task.remote, work, os.umask(os.umask(0o077)))
        submitted: dict[Any, Item] = {}
        waiting = iter(items)
        try:
            while True:
                for item in waiting:
                    submitted[submit(item)] = item
                    if len(submitted) == self._max_submitted:
                        break
                if not submitted:
                    return
                reference = self._first_done(list(submitted))
                done_item = submitted.pop(reference)
                result = self._result(reference)
                del reference  # it keeps the result in the store of objects
                yield done_item, result
                del result
        finally:
            for reference in submitted:
                self._ray.cancel(reference)

    def close(self) -> None:
        """Leave the cluster, which ends the tasks of this process."""
        self._ray.shutdown()

    def _connect(self, address: str) -> None:
        try:
            self._ray.init(
                address=address,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, self._ray.exceptions.RayError) as error:
            raise ConfigError(
                f"{ADDRESS_VARIABLE}={address}: no Ray cluster answers, or it has another token "
                f"({_first_line(error)}). Look whether it runs, and give this process the token "
                "with which it was started (RAY_AUTH_TOKEN_PATH)."
            ) from error

    def _wait_for_nodes(self) -> list[_Node]:
        """Return the nodes that can run tasks, when all that are expected have come."""
        expected = os.environ.get(NODES_VARIABLE, "1")
        if not expected.isdigit():
            raise ConfigError(f"{NODES_VARIABLE} is '{expected}', must be a number of nodes.")
        deadline = time.monotonic() + _START_SECONDS
        while len(nodes := self._living_nodes()) < max(int(expected), 1):
            if time.monotonic() > deadline:
                names = ", ".join(node.name for node in nodes) or "none"
                raise ConfigError(
                    f"the Ray cluster has {len(nodes)} of {expected} nodes with a CPU after "
                    f"{_START_SECONDS} s: {names}. Look into the log of the job for the others."
                )
            time.sleep(0.5)
        return nodes

    def _living_nodes(self) -> list[_Node]:
        """Return the nodes that can run tasks."""
        nodes = []
        for found in self._ray.nodes():
            resources = found["Resources"]
            if found["Alive"] and resources.get("CPU", 0) >= 1:
                nodes.append(
                    _Node(
                        id=found["NodeID"],
                        name=found["NodeManagerHostname"],
                        num_cpus=resources["CPU"],
                        memory_bytes=resources.get("memory", 0),
                    )
                )
        return nodes

    def _check_nodes(self, nodes: Sequence[_Node], work_dir: Path, cache_dir: Path | None) -> None:
        """Refuse a cluster whose nodes do not share these folders, or have other code."""
        token = secrets.token_hex(16)
        cures = {work_dir: "in which this build is made. Choose an --out"}
        if cache_dir is not None:
            cures[cache_dir] = "the part cache. Leave it away (--no_cache), or choose a --cache"
        marks = {folder / f".seen-{token[:8]}": cure for folder, cure in cures.items()}
        try:
            for path in marks:
                path.write_text(token, encoding="ascii")
            problems = self._problems_of_nodes(nodes, marks, token)
        finally:
            for path in marks:
                path.unlink(missing_ok=True)
        if problems:
            raise ConfigError(problems)

    def _problems_of_nodes(
        self, nodes: Sequence[_Node], marks: Mapping[Path, str], token: str
    ) -> list[str]:
        """Return what is wrong with the nodes.

        Args:
            nodes: The nodes.
            marks: Files with the token that each node must see, and what their folders are.
            token: Random digits.
        """
        task = self._ray.remote(_look_around)
        answers = []
        for node in nodes:
            place = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                node_id=node.id, soft=False
            )
            settings = {"num_cpus": 0, "scheduling_strategy": place}
            answers.append(task.options(**settings).remote(tuple(marks), token))
        own_code = digest_of_code()
        problems = []
        for node, answer in zip(nodes, answers, strict=True):
            try:
                seen, code = self._ray.get(answer, timeout=_CHECK_SECONDS)
            except self._ray.exceptions.RayError as error:
                problems.append(
                    f"node {node.name} of the Ray cluster cannot run tasks of this package: "
                    f"{_last_line(error)}. Start Ray on it in the environment of this process, "
                    "with the package installed or its folder in PYTHONPATH."
                )
                continue
            for path, cure in marks.items():
                if path not in seen:
                    problems.append(
                        f"node {node.name} of the Ray cluster does not see {path.parent}, {cure} "
                        "on storage that all nodes share."
                    )
            if code != own_code:
                problems.append(
                    f"node {node.name} of the Ray cluster has other code of data_pipeline than "
                    "this process. Start Ray on it with the same version."
                )
        return problems

    def _check_memory(self) -> None:
        """Refuse a task that no node has the memory for: Ray would wait for one without end."""
        largest = max((node.memory_bytes for node in self._living_nodes()), default=0)
        if largest < TASK_MEMORY_BYTES:
            raise ConfigError(
                f"a task needs {TASK_MEMORY_BYTES / 2**30:.1f} GiB, and the largest node of the "
                f"Ray cluster has {largest / 2**30:.1f} GiB. Start Ray with more --memory, on "
                "nodes that have it."
            )

    def _first_done(self, references: list[Any]) -> Any:
        """Return a task that is done, or wait for the first."""
        while True:
            done, _ = self._ray.wait(references, num_returns=1, timeout=_LOOK_SECONDS)
            if done:
                return done[0]
            if not self._living_nodes():
                raise CptError(
                    "the Ray cluster has lost all its nodes. What is done is kept, and a rerun "
                    "goes on from there."
                )

    def _result(self, reference: Any) -> Any:
        """Return the result of a task that is done, or raise its error as it was raised."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(reference)
        except exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise
        except exceptions.OutOfMemoryError as error:
            raise StorageError(
                "a task on the Ray cluster was ended for lack of memory, several times. Start Ray "
                "with fewer --num-cpus on each node; what is done is kept, and a rerun goes on "
                "from there."
            ) from error
        except exceptions.RayError as error:
            raise CptError(
                f"the Ray cluster has lost a task: {_first_line(error)} (a task is started "
                f"{MAX_RETRIES + 1} times at most, and none after the node of this process is "
                "lost). What is done is kept, and a rerun goes on from there."
            ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class _Node:
    """A node of the cluster that runs tasks."""

    id: str
    name: str
    """Its host name."""
    num_cpus: float
    memory_bytes: float
    """Memory that Ray gives to tasks."""


def check_environment() -> None:
    """Refuse an environment in which no cluster can be used; nothing is started or asked.

    Raises:
        ConfigError: it names no cluster or does not say how that is protected, or Ray is not
            installed.
    """
    address = os.environ.get(ADDRESS_VARIABLE, "")
    problems = []
    if not _ADDRESS.fullmatch(address):
        problems.append(
            f"{ADDRESS_VARIABLE} is '{address}', must be HOST:PORT of a running Ray cluster. "
            "slurm/prepare_data.sbatch starts one with CPT_DATA_ENGINE=ray. On one machine leave "
            "--engine ray away: local processes do the same."
        )
    mode = os.environ.get(MODE_VARIABLE, "")
    if mode not in ("token", "disabled"):
        problems.append(
            f"{MODE_VARIABLE} is '{mode}', must be 'token': whoever reaches a port of a Ray "
            "cluster without a token runs code as this user. Start Ray and this process with "
            f"{MODE_VARIABLE}=token and the same RAY_AUTH_TOKEN_PATH; {MODE_VARIABLE}=disabled "
            "goes without, on a network that nobody else reaches."
        )
    if importlib.util.find_spec("ray") is None:
        problems.append(
            "--engine ray needs the package ray, which is not installed. "
            "Install it: pip install 'gpt-oss-cpt[ray]'."
        )
    if problems:
        raise ConfigError(problems)


def _import_ray() -> Any:
    """Return the package `ray`, which reads its environment when it is imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    importlib.import_module("ray.util.scheduling_strategies")
    return importlib.import_module("ray")


def _run_task(work: Callable[[Item], Result], umask: int, item: Item) -> Result:
    """Run a task on a worker, whose process has the habits of a command line of ours."""
    os.umask(umask)
    raise_descriptor_limit()
    return work(item)


def _look_around(paths: Sequence[Path], token: str) -> tuple[set[Path], str]:
    """Return which files have `token` in them on this node, and the digest of its code."""
    seen = set()
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            if path.read_text(encoding="ascii") == token:
                seen.add(path)
    return seen, digest_of_code()


def digest_of_code() -> str:
    """Return the hex sha256 of all modules of this package."""
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _name_of(work: Callable[..., Any]) -> str:
    return getattr(work, "__name__", "task")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _last_line(error: BaseException) -> str:
    return str(error).strip().rpartition("\n")[2]
