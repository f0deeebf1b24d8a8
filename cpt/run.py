"""Start one rank of a run: `deepspeed cpt/run.py --ds_config ds_configs/z3_ulysses.json`.

parse -> pass the gate -> join the process group -> build -> train -> exit code
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "cpt":
    # the launcher puts cpt/ itself first, where `import config` would find a second copy
    sys.path[0] = str(ROOT)

from cpt.commands.run_options import add_run_options  # noqa: E402
from cpt.errors import (  # noqa: E402
    EXIT_DONE,
    EXIT_INTERNAL,
    ConfigError,
    CptError,
    cause_and_code,
)
from cpt.job.log_files import trace_to_file  # noqa: E402
from cpt.resilience.environment import (  # noqa: E402
    rank_of_environment,
    restore_gpu_ids,
    speaks_for_node,
)
from cpt.resilience.stop import StopRequest  # noqa: E402
from data_pipeline.commands import (  # noqa: E402
    CommandParser,
    prepare_process,
    start_telling,
    with_home_folders,
)
from data_pipeline.console.lasting_output import make_output_lasting  # noqa: E402
from data_pipeline.console.log_lines import log_to_terminal  # noqa: E402
from data_pipeline.console.say import complain  # noqa: E402


class _Parser(CommandParser):
    """Treats a wrong option as a bad configuration: code 78, told by one rank."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. cpt/run.py --help lists the options.")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Command line of a run."""
    parser = _Parser(prog="cpt/run.py", description="Continual pretraining of gpt-oss.")
    add_run_options(parser)
    parser.add_argument("--local_rank", type=int, default=0, help="given by the launcher")
    return with_home_folders(parser.parse_args(arguments))


def main(arguments: list[str], stop: StopRequest) -> int:
    """Run a job and return its exit code; mistakes of people show no stack trace."""
    prepare_process()
    make_output_lasting()
    restore_gpu_ids()
    rank = rank_of_environment()
    log_to_terminal(rank=rank)
    try:
        options = parse_arguments(arguments)
        start_telling(options, rank)
        from cpt.job.start_options import check_start

        check_start(options)  # before the imports of `launch`, which take seconds
        from cpt.job.launch import launch

        launch(options, stop)
        return EXIT_DONE
    except CptError as error:
        trace_to_file(error)
        # once on every node: the cause may lie on that node alone
        if speaks_for_node():
            complain(f"\n{error.shown()}\n", flush=True)
        return error.exit_code
    except Exception as error:
        cause, code = cause_and_code(error)
        what = f"internal error on rank {rank}" if code == EXIT_INTERNAL else cause
        logging.getLogger("cpt").error("%s", what, exc_info=error)
        return code


if __name__ == "__main__":
    request = StopRequest()
    request.listen()  # before the imports of `main`, which take seconds
    code = main(sys.argv[1:], request)
    if code == EXIT_DONE:
        sys.exit(code)
    # a process group that broke in the middle of a collective may never shut down; the code must
    # get out
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
