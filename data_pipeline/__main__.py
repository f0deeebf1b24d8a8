"""`python -m data_pipeline`: build a data mix, look at it, and plan a run over it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.audit.audit import DEFAULT_LIMIT, audit
from data_pipeline.audit.page import audit_page
from data_pipeline.audit.phases import audited_phases
from data_pipeline.build.build import build, build_share
from data_pipeline.build.found_builds import (
    DEFAULT_ROOT,
    NotBuilt,
    builds_by_names,
    find_build,
    load_built_mix,
    resolve_build_dir,
)
from data_pipeline.build.summary import describe_build
from data_pipeline.commands import (
    CommandParser,
    end_with_reason,
    prepare_process,
    start_telling,
    with_home_folders,
)
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.mix_file import load_mix
from data_pipeline.console.say import say, say_marked
from data_pipeline.dataset import BuiltData
from data_pipeline.engine.choice import ENGINES, LOCAL, check_engine
from data_pipeline.engine.local import available_cores
from data_pipeline.errors import ConfigError, DataError
from data_pipeline.fates.dropped import describe_dropped, describe_stock_text, dropped_rows
from data_pipeline.fates.guard_sets import describe_guard_sets
from data_pipeline.mixture.epochs import describe_weights, has_epochs, with_weights
from data_pipeline.mixture.ledger import Ledger, resume_ledger
from data_pipeline.mixture.plan_comparison import compare_plans
from data_pipeline.mixture.plan_figure import draw_plan
from data_pipeline.mixture.settings import describe_changes, describe_rates, mix_settings
from data_pipeline.mixture.staged_plan import plan_mix, steps_of_one_pass
from data_pipeline.parts.cache_folder import (
    CACHE_NAME,
    CACHE_VARIABLE,
    default_cache,
    describe_cache,
    list_entries,
    notes_for_reading,
    notes_in,
    open_cache,
    prune,
)
from data_pipeline.store.files import write_text
from data_pipeline.store.manifest import BuildManifest, SourceEntry, read_manifest

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

MAX_ROWS = 2**33
"""Rows of the longest run that is planned, 35 trillion tokens in rows of 4,096: some hours."""
PROGRAM = "data_pipeline"
"""Name in messages about bugs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    parser: argparse.ArgumentParser = CommandParser(
        prog="python -m data_pipeline", description=__doc__
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_build(commands)
    _add_plan(commands)
    _add_diff(commands)
    _add_audit(commands)
    _add_cache(commands)
    _add_moved_corpus(commands)
    options = with_home_folders(parser.parse_args(arguments))
    prepare_process()
    start_telling(options)
    try:
        options.run(options)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        return end_with_reason(error, PROGRAM)
    return 0


def _add_build(commands: Commands) -> None:
    text = "make the token shards and packed rows that training reads"
    parser = commands.add_parser("build", help=text, description=text)
    parser.set_defaults(run=_build)
    _add_mix(parser, "mix")
    _add_engine(parser)
    _add_build_dir(parser)
    _add_cache_dir(parser)
    parser.add_argument(
        "--no_cache", action="store_true", help="neither take parts from a cache nor keep them"
    )
    parser.add_argument(
        "--share",
        type=_share,
        metavar="K/N",
        help="make only share K (from 0) of N; a build without it finishes them",
    )


def _build(options: argparse.Namespace) -> None:
    mix = load_mix(options.mix)
    if options.share and options.engine != LOCAL:
        raise ConfigError(
            f"--share makes its parts on one machine, and --engine {options.engine} those of a "
            "whole build on many. Leave one of them away."
        )
    check_engine(options.engine)
    cache_dir = None
    if not options.no_cache:
        cache_dir = open_cache(_folder_of_builds(options.out), options.cache)
    notes = None if cache_dir is None else notes_in(cache_dir)
    out_dir = resolve_build_dir(mix, options.out, notes, options.workers)
    if options.share:
        index, count = options.share
        num_parts = build_share(mix, out_dir, index, count, options.workers, cache_dir)
        say(
            f"{out_dir}: share {index} of {count} has {num_parts} parts. When all are done, build "
            "without --share."
        )
        return
    manifest = build(
        mix, out_dir, workers=options.workers, engine=options.engine, cache_dir=cache_dir
    )
    say(describe_build(manifest.sources))
    if has_epochs(mix):
        say(describe_weights(with_weights(mix, manifest)))
    _say_dropped(manifest)
    say(f"{out_dir}: manifest {manifest.hash[:16]}, fingerprint {manifest.fingerprint[:10]}")


def _say_dropped(manifest: BuildManifest) -> None:
    """Tell what a build did not take, what it takes against a rule, and what measures it."""
    texts = (
        describe_dropped(manifest.sources),
        describe_stock_text(manifest.stock_text),
        describe_guard_sets(manifest),
    )
    for text in texts:
        if text:
            say(text)


def _add_plan(commands: Commands) -> None:
    text = "show what a run draws from each source of a mix that is built"
    parser = commands.add_parser("plan", help=text, description=text)
    parser.set_defaults(run=_plan)
    _add_mix(parser, "mix")
    _add_workers(parser)
    _add_build_dir(parser)
    _add_build_if_missing(parser)
    _add_run_size(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.svg", help="write shares and epochs as an SVG picture"
    )


def _plan(options: argparse.Namespace) -> None:
    mix = load_built_mix(options.mix, options.out)
    built, mix = _open_build(options, mix, options.mix, options.out)
    steps = options.steps or steps_of_one_pass(built, mix, options.global_batch_size)
    _check_run_size(steps, options.global_batch_size)
    plan = plan_mix(built, mix, steps, options.global_batch_size)
    say(plan.describe())
    _say_dropped(built.manifest)
    if options.json:
        _write(options.json, json.dumps(plan.to_json(), indent=1) + "\n")
    if options.plot:
        _write(options.plot, draw_plan(plan.whole()))
    if plan.problems:
        raise DataError("\n".join(plan.problems))


def _add_diff(commands: Commands) -> None:
    text = "show what an edit of a mix changes in tokens, epochs and shares"
    parser = commands.add_parser("diff", help=text, description=text)
    parser.set_defaults(run=_diff)
    _add_mix(parser, "old")
    _add_mix(parser, "new")
    _add_workers(parser)
    for name in ("old", "new"):
        parser.add_argument(
            f"--{name}_out",
            type=Path,
            metavar="DIR",
            help=f"build directory of {name.upper()}.yaml (default: looked for in {DEFAULT_ROOT}/)",
        )
    _add_build_if_missing(parser)
    _add_run_size(parser)
    parser.add_argument(
        "--at_step", type=_positive, metavar="STEP", help="first step with the new mix (default: 0)"
    )


def _diff(options: argparse.Namespace) -> None:
    old = load_built_mix(options.old, options.old_out)
    new = load_built_mix(options.new, options.new_out)
    by_epochs = has_epochs(old) or has_epochs(new)
    if not by_epochs:
        _say_changes(old, new)  # also where one of them is not built
    old_built, old = _open_build(options, old, options.old, options.old_out)
    new_built, new = _open_build(options, new, options.new, options.new_out)
    if by_epochs:
        _say_changes(old, new)
    batch_size = options.global_batch_size
    steps = options.steps or steps_of_one_pass(old_built, old, batch_size)
    _check_run_size(max(steps, options.at_step or 0), batch_size)
    ledger = None
    edit = ""
    if options.at_step is not None:
        stored = Ledger.start(old, old_built.manifest.row_hashes(), steps).to_json()
        rows = new_built.manifest.row_hashes()
        ledger = resume_ledger(
            stored, new, options.at_step, accept_change=True, rows=rows, total_steps=steps
        )
        edit = f", the edit made at step {options.at_step:,}"
    old_plan = plan_mix(old_built, old, steps, batch_size).whole()
    new_plan = plan_mix(new_built, new, steps, batch_size, ledger).whole()
    say(f"\nover {steps:,} steps of {batch_size:,} rows{edit}:")
    say(compare_plans(old_plan, new_plan))


def _say_changes(old: MixConfig, new: MixConfig) -> None:
    changes = describe_changes(mix_settings(old), mix_settings(new))
    changes += describe_rates(old, new)
    say("\n".join(changes) or "no setting differs")


def _add_audit(commands: Commands) -> None:
    text = "look at language and quality of the text; exit code 65 if a source is mislabelled"
    parser = commands.add_parser("audit", help=text, description=text)
    parser.set_defaults(run=_audit)
    _add_mix(parser, "mix")
    _add_workers(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help="page to write (default: data/NAME-audit.html)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    parser.add_argument(
        "--documents", type=_positive, default=DEFAULT_LIMIT, help="documents per source at most"
    )
    _add_run_size(parser)


def _audit(options: argparse.Namespace) -> None:
    mix = load_mix(options.mix)
    result = audit(mix, options.documents, options.workers)
    say(result.describe())
    for source in result.sources:
        if source.conversation is not None:
            say(f"{source.name}, a conversation; {source.conversation.title}")
            say_marked(source.conversation.pieces)
    entries: tuple[SourceEntry, ...] = ()
    told, folder = _find_folder(mix, options.workers)
    built = None
    if folder is not None:
        manifest = read_manifest(folder)
        entries = manifest.sources
        _say_dropped(manifest)
        if mix.schedule or has_epochs(mix):
            built = BuiltData.open(folder, verify=False, mix=mix)
    phases = audited_phases(mix, built, options.steps, options.global_batch_size)
    if phases.describe():
        say(phases.describe())
    page = options.out or DEFAULT_ROOT / f"{mix.name}-audit.html"
    _write(page, audit_page(result, dropped_rows(entries), told, phases))
    if options.json:
        figures = [source.to_json() for source in result.sources]
        _write(options.json, json.dumps(figures, indent=1) + "\n")
    say(f"page: {page}")
    problems = result.problems()
    if problems:
        raise DataError("\n".join(problems))


def _find_folder(mix: MixConfig, workers: int | None) -> tuple[str, Path | None]:
    """Tell and return (which build was found, its folder) for a mix; None if there is none.

    Where no cache has the hashes of the input, an audit does not read all of it for them.
    """
    notes = notes_for_reading(DEFAULT_ROOT)
    if notes is None:
        found = next(iter(builds_by_names(mix)), None)
        told = "a build of files of the same names and sizes (contents were not compared)"
    else:
        try:
            found = find_build(mix, None, notes, workers)
        except ConfigError as error:
            say(f"{error} Nothing is known of what a build drops.")
            return "", None
        told = "the build of this mix"
    if found is None:
        return "", None
    say(f"dropped by {told} in {found}:")
    return told, found


def _add_cache(commands: Commands) -> None:
    text = "show the parts that builds share, or remove those that no build shares"
    parser = commands.add_parser("cache", help=text, description=text)
    parser.set_defaults(run=_cache)
    _add_cache_dir(parser)
    parser.add_argument(
        "--older_than",
        type=_days,
        metavar="DAYS",
        help="remove parts that no build shares and that were not used for longer",
    )
    parser.add_argument(
        "--max_gb",
        type=_gigabytes,
        metavar="GB",
        help="remove parts that no build shares, the least recently used first, until the others "
        "take no more",
    )


def _cache(options: argparse.Namespace) -> None:
    folder = default_cache(DEFAULT_ROOT, options.cache)
    if options.older_than is None and options.max_gb is None:
        say(f"{folder}:")
        say(describe_cache(list_entries(folder)))
        return
    max_bytes = None if options.max_gb is None else int(options.max_gb * 1e9)
    removed = prune(folder, options.older_than, max_bytes)
    freed = sum(entry.own_bytes for entry in removed)
    say(f"{folder}: removed {len(removed):,} parts, {freed / 1e9:,.2f} GB")


def _add_moved_corpus(commands: Commands) -> None:
    """Add an old word, which `--help` does not show."""
    parser = commands.add_parser("corpus", add_help=False)
    parser.set_defaults(run=_refuse_corpus)
    parser.add_argument("--out")


def _refuse_corpus(options: argparse.Namespace) -> None:
    del options
    raise ConfigError(
        "'corpus' is no subcommand of this program. To fetch the corpus, run "
        "`python bench/corpus.py --out DIR` in a checkout of the repository."
    )


def _add_mix(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(name, type=Path, metavar=f"{name.upper()}.yaml", help="data-mix YAML")


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_positive,
        default=available_cores(),
        help="number of processes; the output is the same",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=LOCAL,
        help="where tasks run: processes of this machine, or the Ray cluster at RAY_ADDRESS; the "
        "output is the same",
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        help="tasks at once; the output is the same (default: as many as the engine has cores)",
    )


def _add_build_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="build directory (default: data/NAME-FINGERPRINT)"
    )


def _add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help=f"folder of the parts that builds share (default: {CACHE_VARIABLE}, or {CACHE_NAME} "
        "beside the builds)",
    )


def _add_run_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps",
        type=_positive,
        help="optimizer steps of the run (default: one pass over the rows)",
    )
    parser.add_argument(
        "--global_batch_size",
        type=_positive,
        default=8,
        help="packed rows per step, in the first of several stages (default: 8)",
    )


def _add_build_if_missing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--build", action="store_true", help="build what is not built yet, instead of refusing"
    )


def _open_build(
    options: argparse.Namespace, mix: MixConfig, mix_file: Path, build_dir: Path | None
) -> tuple[BuiltData, MixConfig]:
    """Open the build of a mix, and name it; it is made only if the command line says so.

    A build that is there is not read to its end.

    Returns:
        The build, and the mix with the weights that its epochs mean over it.

    Raises:
        NotBuilt: there is none; the message says how to make one.
    """
    notes = notes_for_reading(_folder_of_builds(build_dir))
    try:
        found = find_build(mix, build_dir, notes, options.workers)
    except NotBuilt as error:
        if not options.build:
            out = "" if build_dir is None else f" --out {build_dir}"
            raise NotBuilt(
                f"{error} Build it: python -m data_pipeline build {mix_file}{out}, or add --build "
                "to do both. A build elsewhere is named with --out (diff: --old_out, --new_out)."
            ) from None
        cache_dir = open_cache(_folder_of_builds(build_dir))
        found = resolve_build_dir(mix, build_dir, notes, options.workers)
        build(mix, found, workers=options.workers, cache_dir=cache_dir)
    say(f"build of {mix_file}: {found}")
    built = BuiltData.open(found, verify=False, mix=mix)
    return built, with_weights(mix, built.manifest)


def _folder_of_builds(build_dir: Path | None) -> Path:
    """Return the folder that a build lies in, and the cache beside it."""
    return DEFAULT_ROOT if build_dir is None else build_dir.absolute().parent


def _check_run_size(steps: int, global_batch_size: int) -> None:
    """Refuse a run whose rows nobody can wait for.

    Raises:
        ConfigError: it has more than `MAX_ROWS`.
    """
    if steps * global_batch_size > MAX_ROWS:
        raise ConfigError(
            f"--steps {steps:,} times --global_batch_size {global_batch_size:,} is "
            f"{steps * global_batch_size:,} rows; at most {MAX_ROWS:,} are planned. Lower one."
        )


def _write(path: Path, text: str) -> None:
    """Write a file atomically; a device or pipe, such as /dev/stdout, is written to."""
    # names of files that are not UTF-8 have characters that no encoding has
    content = text.encode("utf-8", "backslashreplace").decode("utf-8")
    if path.exists() and not path.is_file():
        path.write_text(content, encoding="utf-8")
        return
    if path.is_symlink():
        path = path.resolve()  # a rename would replace the link, for example /dev/stdout
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, content)


def _positive(text: str) -> int:
    value = int(text)
    if not 1 <= value <= MAX_ROWS:
        raise argparse.ArgumentTypeError(f"{value} is not from 1 to {MAX_ROWS:,}")
    return value


def _days(text: str) -> float:
    return _at_least_zero(text, "days")


def _gigabytes(text: str) -> float:
    return _at_least_zero(text, "gigabytes")


def _at_least_zero(text: str, unit: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of {unit} from 0 upwards")
    return value


def _share(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"'{text}' is not K/N with K from 0 to N - 1")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(main())
