"""`cpt data where`: the files and records that a row of a step, or a document, comes from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.commands import Commands
from cpt.commands.early_checks import folder_problems, refuse, run_dir_problems
from data_pipeline.console.say import complain, say

if TYPE_CHECKING:
    from data_pipeline.mixture.row_origins import PieceOrigin

MAX_STEP = 2**40


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("data", help="say where the text of a step comes from")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    where = actions.add_parser(
        "where", help="name source, file and record of a row of a step, or of a document"
    )
    where.add_argument("--run_dir", type=Path, help="run directory, with --step")
    where.add_argument("--step", type=int, help="step, counted from 1 as in metrics.jsonl")
    where.add_argument(
        "--row", type=int, help="row of the step's global batch, from 0 (default: all of them)"
    )
    where.add_argument(
        "--build_dir", type=Path, help="build; with --run_dir, where the run's build is now"
    )
    where.add_argument("--source", help="source of the build, with --document")
    where.add_argument("--document", type=int, help="number of a document in the source's shards")
    where.add_argument("--json", action="store_true", help="print JSON")
    where.set_defaults(run=_run_where)


def _run_where(options: argparse.Namespace) -> None:
    refuse(
        _problems(options),
        run_dir_problems(options.run_dir),
        folder_problems("--build_dir", options.build_dir),
    )
    if options.run_dir is None:
        from data_pipeline.mixture.row_origins import document_origin

        found = document_origin(options.build_dir, options.source, options.document, None)
        _tell(options, [(None, [found])])
        return
    _tell(options, _rows_of_step(options))


def _rows_of_step(options: argparse.Namespace) -> list[tuple[int | None, list[PieceOrigin]]]:
    """Return (number of the row in the global batch, origins in it) for the rows asked for."""
    from cpt.checkpoint.drawn_rows import open_run_data
    from data_pipeline.mixture.row_origins import row_origins

    run = open_run_data(options.run_dir, options.build_dir)
    step = run.at_step(options.step)
    size = step.num_rows
    if options.row is not None:
        row_out = not 0 <= options.row < size
        refuse([f"--row {options.row}: a step has the rows 0 to {size - 1}."] if row_out else [])
    if options.step > run.saved_step:
        complain(
            f"step {options.step} is not in a checkpoint (the newest is of step {run.saved_step}): "
            "this is what it takes unless the mix is changed before it, by an edit or by the guard"
        )
    batch = step.draw()
    rows = range(size) if options.row is None else [options.row]
    found: list[tuple[int | None, list[PieceOrigin]]] = []
    for row in rows:
        source = int(batch.sources[row])
        found.append((row, row_origins(step.data, source, int(batch.rows[row]), run.mix)))
    return found


def _problems(options: argparse.Namespace) -> list[str]:
    """Return what is wrong with the combination of options."""
    of_document = options.source is not None and options.document is not None
    if options.run_dir is None and not (options.build_dir is not None and of_document):
        return ["give --run_dir and --step, or --build_dir, --source and --document."]
    if options.run_dir is not None and (options.source is not None or options.document is not None):
        return ["--source and --document go with --build_dir alone, --run_dir with --step."]
    if options.run_dir is not None and options.step is None:
        return ["--run_dir needs --step."]
    if options.run_dir is not None and not 1 <= options.step <= MAX_STEP:
        return [f"--step {options.step}: steps are counted from 1."]
    return []


def _tell(options: argparse.Namespace, rows: list[tuple[int | None, list[PieceOrigin]]]) -> None:
    if options.json:
        values = []
        for row, origins in rows:
            values.append({"row": row, "documents": [origin.to_json() for origin in origins]})
        say(json.dumps({"step": options.step, "rows": values}))
        return
    for row, origins in rows:
        if row is not None:
            say(f"step {options.step}, row {row}:")
        for origin in origins:
            say(origin.describe())
