"""`python -m data_pipeline`: build a data mix, look at it, and plan a run over it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from data_pipeline.audit.audit import DEFAULT_LIMIT, audit
from data_pipeline.audit.page import audit_page
from data_pipeline.build.build import (
    DEFAULT_ROOT,
    build,
    build_share,
    fingerprint,
    resolve_build_dir,
)
from data_pipeline.build.guard_sets import describe_guard_sets
from data_pipeline.build.summary import describe_build
from data_pipeline.build.workers import available_cores
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import ConfigError, CptError, DataError
from data_pipeline.mixture.data_plan import DataPlan, make_data_plan
from data_pipeline.mixture.ledger import Ledger, resume_ledger
from data_pipeline.mixture.plan_comparison import compare_plans
from data_pipeline.mixture.plan_figure import draw_plan
from data_pipeline.mixture.settings import describe_changes, mix_settings
from data_pipeline.store.files import write_text
from data_pipeline.store.manifest import FILE_NAME, read_manifest

"""Where builds go that are given no place."""
EXIT_STORAGE = 74


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    commands: dict[str, Callable[[argparse.Namespace], None]]
    commands = {"build": _build, "plan": _plan, "diff": _diff, "audit": _audit, "corpus": _moved}
    try:
        commands[options.command](options)
    except CptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{error.filename or 'storage'}: {error.strerror or error}.", file=sys.stderr)
        return EXIT_STORAGE
    return 0


def _build(options: argparse.Namespace) -> None:
    mix = load_mix(options.mix)
    out_dir = resolve_build_dir(mix, options.out)
    if options.share:
        index, count = options.share
        made = build_share(mix, out_dir, index, count, options.workers)
        print(
            f"{out_dir}: share {index} of {count} has {made} parts. When all are done, build without --share."
        )
        return
    manifest = build(mix, out_dir, workers=options.workers)
    print(describe_build(manifest.sources))
    print(describe_guard_sets(manifest), end="\n" * bool(manifest.guard_domains))
    print(f"{out_dir}: manifest {manifest.hash[:16]}, fingerprint {manifest.fingerprint[:10]}")


def _plan(options: argparse.Namespace) -> None:
    mix = load_mix(options.mix)
    built = _built(mix, options.out, options.workers)
    plan = make_data_plan(
        built, mix, options.steps or _one_pass(built, options), options.global_batch_size
    )
    print(plan.describe())
    if options.json:
        _write(options.json, json.dumps(plan.to_json(), indent=1) + "\n")
    if options.plot:
        _write(options.plot, draw_plan(plan))
    if plan.problems:
        raise DataError("\n".join(plan.problems))


def _diff(options: argparse.Namespace) -> None:
    old, new = load_mix(options.old), load_mix(options.new)
    changes = describe_changes(mix_settings(old), mix_settings(new))
    print("\n".join(changes) or "no setting differs")
    before, after = _built(old, None, options.workers), _built(new, None, options.workers)
    steps, ledger = options.steps or _one_pass(before, options), None
    if options.at_step is not None:
        stored = Ledger.start(old, before.manifest.row_hashes()).to_json()
        rows = after.manifest.row_hashes()
        ledger = resume_ledger(stored, new, options.at_step, accept_change=True, rows=rows)
    plans: list[DataPlan] = [
        make_data_plan(before, old, steps, options.global_batch_size),
        make_data_plan(after, new, steps, options.global_batch_size, ledger),
    ]
    edit = "" if options.at_step is None else f", the edit made at step {options.at_step:,}"
    print(
        f"\nover {steps:,} steps of {options.global_batch_size:,} rows{edit}:\n{compare_plans(*plans)}"
    )


def _audit(options: argparse.Namespace) -> None:
    mix = load_mix(options.mix)
    result = audit(mix, options.documents, options.workers)
    print(result.describe())
    page = options.out or DEFAULT_ROOT / f"{mix.name}-audit.html"
    _write(page, audit_page(result))
    if options.json:
        _write(
            options.json,
            json.dumps([source.to_json() for source in result.sources], indent=1) + "\n",
        )
    print(f"page: {page}")
    if problems := result.problems():
        raise DataError("\n".join(problems))


def _moved(options: argparse.Namespace) -> None:
    raise ConfigError(
        f"'{options.command}' is no subcommand of this program. To fetch the corpus, run "
        "`python bench/corpus.py --out DIR` in a checkout of the repository."
    )


def _built(mix: MixConfig, out_dir: Path | None, workers: int) -> BuiltData:
    """The build of a mix, made if it is missing; one that is there is not read to its end."""
    out_dir = resolve_build_dir(mix, out_dir)
    if not (out_dir / FILE_NAME).exists() or read_manifest(out_dir).fingerprint != fingerprint(mix):
        build(mix, out_dir, workers=workers)
    return BuiltData.open(out_dir, verify=False, mix=mix)


def _one_pass(built: BuiltData, options: argparse.Namespace) -> int:
    """Steps that draw as many rows as the build has."""
    rows = sum(built.num_rows(source) for source in range(len(built.source_names)))
    return max(-(-rows // options.global_batch_size), 1)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, *mixes: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        for mix in mixes:
            command.add_argument(mix, type=Path, metavar=f"{mix.upper()}.yaml")
        if mixes:
            command.add_argument(
                "--workers",
                type=_positive,
                default=available_cores(),
                help="processes; the output is the same",
            )
        return command

    command = add("build", "make the token shards and packed rows that training reads", "mix")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="build directory (default: data/NAME-FINGERPRINT)"
    )
    command.add_argument(
        "--share",
        type=_share,
        metavar="K/N",
        help="make only share K (from 0) of N; a build without it finishes them",
    )
    command = add("plan", "show what a run draws from each source; builds what is missing", "mix")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="build directory (default: data/NAME-FINGERPRINT)"
    )
    _add_run(command)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    command.add_argument(
        "--plot", type=Path, metavar="FILE.svg", help="write shares and epochs as an SVG picture"
    )
    command = add(
        "diff", "show what an edit of a mix changes in tokens, epochs and shares", "old", "new"
    )
    _add_run(command)
    command.add_argument(
        "--at_step", type=_positive, metavar="STEP", help="first step with the new mix (default: 0)"
    )
    command = add(
        "audit",
        "look at language and quality of the text; exit code 65 if a source is mislabelled",
        "mix",
    )
    command.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="page to write (default: data/NAME-audit.html)",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    command.add_argument(
        "--documents", type=_positive, default=DEFAULT_LIMIT, help="documents per source at most"
    )
    moved = commands.add_parser("corpus", add_help=False)
    moved.add_argument("--out")
    return parser


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--steps",
        type=_positive,
        help="optimizer steps of the run (default: one pass over the rows)",
    )
    command.add_argument(
        "--global_batch_size", type=_positive, default=8, help="packed rows per step (default: 8)"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"'{text}' is not K/N with K from 0 to N - 1")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(main())
