"""`cpt suite`: benchmarks of other tools against a served model, their verdict, and a plot."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.commands import Commands
from data_pipeline.console.say import say
from data_pipeline.escaping import escaped_line

if TYPE_CHECKING:
    from cpt.offline.evaluation.benchmark_commands import Programs
    from cpt.offline.evaluation.suite import Suite


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "suite", help="run benchmarks against a served model, compare and plot their scores"
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add_check(actions)
    _add_run(actions)
    _add_collect(actions)
    _add_compare(actions)
    _add_plot(actions)


def _add_suite(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--suite",
        type=Path,
        required=required,
        help="suite YAML, such as configs/suites/gpt-oss.yaml",
    )
    parser.add_argument(
        "--only", default="", help="names of benchmarks, with commas; default: all of the suite"
    )


def _add_check(actions: Commands) -> None:
    parser = actions.add_parser(
        "check",
        help="before a model is served, refuse its directory if it holds code, and a suite that "
        "lacks a program, a variable or a usable baseline",
    )
    parser.add_argument("--model", type=Path, help="directory to serve")
    _add_suite(parser, required=False)
    _add_what_a_suite_needs(parser)
    parser.set_defaults(run=_check)


def _add_run(actions: Commands) -> None:
    parser = actions.add_parser("run", help="run what is not done; slurm/evaluate.sbatch calls it")
    _add_suite(parser)
    parser.add_argument("--server", required=True, help="address, such as http://127.0.0.1:8000")
    parser.add_argument("--model", type=Path, required=True, help="directory of the served model")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    _add_what_a_suite_needs(parser)
    parser.set_defaults(run=_run)


def _add_what_a_suite_needs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--baseline", type=Path, help="result of the model before training")
    parser.add_argument("--lm_eval", default="lm_eval", help="words that start lm_eval")
    parser.add_argument("--lighteval", default="lighteval", help="words that start lighteval")


def _add_collect(actions: Commands) -> None:
    parser = actions.add_parser("collect", help="join the results of a suite in one file")
    _add_suite(parser)
    parser.add_argument("--results", type=Path, required=True, help="the --out of cpt suite run")
    parser.add_argument(
        "--model", type=Path, required=True, help="directory of the model that was served"
    )
    parser.add_argument("--step", type=int, help="step of the checkpoint, for the plot")
    parser.add_argument("--out", type=Path, required=True, help="file for the result, as JSON")
    parser.set_defaults(run=_collect)


def _add_compare(actions: Commands) -> None:
    parser = actions.add_parser(
        "compare", help="compare with the model before training; exit codes as cpt evaluate"
    )
    _add_suite(parser)
    parser.add_argument("--result", type=Path, required=True, help="file of cpt suite collect")
    parser.add_argument("--baseline", type=Path, required=True, help="that of the model before")
    parser.set_defaults(run=_compare)


def _add_plot(actions: Commands) -> None:
    parser = actions.add_parser("plot", help="draw the scores of several checkpoints as SVG")
    parser.add_argument("results", type=Path, nargs="+", help="files of cpt suite collect")
    parser.add_argument("--baseline", type=Path, help="that of the model before training")
    parser.add_argument("--out", type=Path, required=True, help="SVG file")
    parser.set_defaults(run=_plot)


def _suite(options: argparse.Namespace) -> Suite:
    from cpt.offline.evaluation.suite import load_suite

    return load_suite(options.suite, [name for name in options.only.split(",") if name])


def _check(options: argparse.Namespace) -> None:
    from cpt.errors import ConfigError
    from cpt.model.foreign_code import refuse_foreign_code

    if options.model is None and options.suite is None:
        raise ConfigError("nothing to check: give --model, --suite, or both.")
    if options.model is not None:
        refuse_foreign_code(options.model, "--model")
    if options.suite is not None:
        _check_suite(options)


def _check_suite(options: argparse.Namespace) -> None:
    """Refuse what can be known of a suite without a server."""
    from cpt.errors import ConfigError
    from cpt.offline.evaluation.suite_run import missing_for

    suite = _suite(options)
    _check_baseline(suite, options.baseline)
    problems = missing_for(suite, _programs(options))
    if problems:
        raise ConfigError(problems)


def _check_baseline(suite: Suite, baseline: Path | None) -> None:
    from cpt.offline.evaluation.scores import read_result
    from cpt.offline.evaluation.verdict import check_baseline

    if baseline is not None:
        check_baseline(suite.limits, {}, read_result(baseline).scores)


def _programs(options: argparse.Namespace) -> Programs:
    from cpt.offline.evaluation.benchmark_commands import Programs

    return Programs(lm_eval=options.lm_eval, lighteval=options.lighteval)


def _run(options: argparse.Namespace) -> None:
    from cpt.model.foreign_code import refuse_foreign_code
    from cpt.offline.evaluation.suite_run import check_suite, find_model, run_suite

    suite = _suite(options)
    refuse_foreign_code(options.model, "--model")
    _check_baseline(suite, options.baseline)
    model = find_model(options.server, options.model)
    programs = _programs(options)
    check_suite(suite, model, programs)
    run_suite(suite, model, programs, options.out)


def _collect(options: argparse.Namespace) -> None:
    from cpt.offline.evaluation.scores import refuse_same_file, write_result
    from cpt.offline.evaluation.suite_results import collect
    from cpt.offline.evaluation.verdict import score_table

    refuse_same_file(options.out, {"--suite": options.suite})
    result = collect(_suite(options), options.results, options.model, options.step)
    write_result(options.out, result)
    say(f"{score_table(result.scores, ())}\n-> {options.out}")


def _compare(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from cpt.offline.evaluation.scores import read_result, refuse_same_file, write_result
    from cpt.offline.evaluation.verdict import compare_with_baseline, refuse_drops, score_table

    inputs = {"--suite": options.suite, "--baseline": options.baseline}
    refuse_same_file(options.result, inputs, "--result")
    limits = _suite(options).limits
    result = read_result(options.result, "--result")
    baseline = read_result(options.baseline)
    verdicts = compare_with_baseline(limits, result.scores, baseline.scores)
    write_result(options.result, replace(result, verdicts=verdicts))
    say(f"{score_table(result.scores, verdicts)}\n-> {options.result}")
    refuse_drops(verdicts)


def _plot(options: argparse.Namespace) -> None:
    from cpt.offline.evaluation.scores import read_result, refuse_same_file
    from cpt.offline.evaluation.suite_plot import checkpoint_figure, read_results
    from data_pipeline.store.files import write_text

    inputs = {"--baseline": options.baseline}
    for number, path in enumerate(options.results, 1):
        inputs[f"result {number}"] = path
    refuse_same_file(options.out, inputs)
    baseline = read_result(options.baseline) if options.baseline is not None else None
    results = read_results(options.results)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, checkpoint_figure(results, baseline))
    say(escaped_line(options.out))
