"""The `cpt` command: what is done with a run besides training it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cpt.errors import CheckpointError, ConfigError, CptError


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="cpt", description="Continual pretraining of gpt-oss: before and after the run."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_export(commands)
    _add_merge(commands)
    _add_sample(commands)
    _add_report(commands)
    _add_status(commands)
    _add_checkpoints(commands)
    _add_guard(commands)
    _add_plan(commands)
    _add_evaluate(commands)
    _add_replay(commands)
    doctor = commands.add_parser(
        "doctor", help="versions, devices, and which attention backends run here, or why not"
    )
    doctor.set_defaults(run=_doctor)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
        return 0
    except CptError as error:
        print(f"{error}", file=sys.stderr)
        return error.exit_code


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("export", help="write a checkpoint as a Hugging Face directory")
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument("--step", type=int, help="default: the newest complete checkpoint")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--format", default="bf16", help="bf16, mxfp4 or fp32")
    parser.add_argument(
        "--score",
        choices=("auto", "always", "never"),
        default="auto",
        help="of mxfp4: measure its cost on the run's held-out text; auto: if it is there and the model small enough",
    )
    parser.set_defaults(run=_export)


def _add_merge(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "merge", help="interpolate between the weights before and after training"
    )
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        help="Hugging Face directory of the model before training",
    )
    parser.add_argument(
        "--tuned", type=Path, required=True, help="Hugging Face directory of the model after it"
    )
    parser.add_argument(
        "--alpha", default="0.0:1.0:0.1", help="shares of the tuned model: FROM:TO:STEP or A,B,C"
    )
    parser.add_argument("--out", type=Path, required=True, help="gets one directory per alpha")
    parser.add_argument(
        "--mix", type=Path, help="data-mix YAML whose held-out text is scored for every alpha"
    )
    parser.add_argument(
        "--build_dir", type=Path, help="where that mix is built; default: as in training"
    )
    parser.add_argument(
        "--max_documents", type=int, default=256, help="documents scored per held-out domain"
    )
    parser.add_argument(
        "--score_only", action="store_true", help="write scores and plot, but no weights"
    )
    parser.set_defaults(run=_merge)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "evaluate", help="run tasks on an export; exit code 65 if one dropped more than it may"
    )
    parser.add_argument("--model", type=Path, required=True, help="an exported directory")
    parser.add_argument(
        "--tasks", type=Path, required=True, help="task YAML, such as configs/tasks/sample.yaml"
    )
    parser.add_argument("--out", type=Path, required=True, help="gets the result as JSON")
    baseline = parser.add_mutually_exclusive_group()
    baseline.add_argument("--baseline", type=Path, help="result of the model before training")
    baseline.add_argument(
        "--no_baseline", action="store_true", help="this is the model before training: only measure"
    )
    parser.add_argument(
        "--batch_size", type=int, default=1, help="of tasks of lm-evaluation-harness"
    )
    parser.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from cpt.offline.evaluation.comparison import evaluate

    if options.baseline is None and not options.no_baseline:
        raise ConfigError(
            "--baseline is missing. Give the result of the model before training, or --no_baseline for it."
        )
    evaluate(options.model, options.tasks, options.out, options.baseline, options.batch_size)


def _add_replay(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "replay", help="let the base model write replay for itself (kind: self_replay)"
    )
    parser.add_argument("--model", type=Path, help="Hugging Face directory of the base model")
    parser.add_argument(
        "--out", type=Path, help="new folder for plain.jsonl, chat.jsonl and the sidecar"
    )
    parser.add_argument(
        "--prefixes", type=Path, help="JSONL with 'text': the first tokens of each are continued"
    )
    parser.add_argument(
        "--questions", type=Path, help="JSONL with 'prompt': each is asked in the Harmony format"
    )
    parser.add_argument("--prefix_tokens", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_replay)
    actions = parser.add_subparsers(metavar="ACTION")
    targets = actions.add_parser(
        "targets", help="the base model's likeliest next tokens, for train.kl_targets"
    )
    targets.add_argument(
        "--model", type=Path, required=True, help="Hugging Face directory of the base model"
    )
    targets.add_argument(
        "--build", type=Path, required=True, help="built shards, as for data.build_dir"
    )
    targets.add_argument(
        "--source", action="append", required=True, help="of that build; may be given several times"
    )
    targets.add_argument("--top_k", type=int, default=32, help="tokens listed per predicted token")
    targets.add_argument("--out", type=Path, required=True, help="new folder")
    targets.set_defaults(run=_targets)


def _targets(options: argparse.Namespace) -> None:
    from cpt.offline.kl_target_writer import TargetsRequest, write_targets

    print(write_targets(TargetsRequest(model_dir=options.model, build_dir=options.build, sources=options.source,
                                       top_k=options.top_k, out=options.out)))  # fmt: skip


def _replay(options: argparse.Namespace) -> None:
    from cpt.offline.sampling import Sampling
    from cpt.offline.self_replay import ReplayRequest, sample_replay

    missing = [
        f"--{name} is missing." for name in ("model", "out") if getattr(options, name) is None
    ]
    if missing:
        raise ConfigError(missing)
    keys = ("max_new_tokens", "temperature", "top_p", "seed")
    request = ReplayRequest(
        model_dir=options.model,
        out=options.out,
        prefixes=options.prefixes,
        questions=options.questions,
        prefix_tokens=options.prefix_tokens,
        sampling=Sampling(**{key: getattr(options, key) for key in keys}),
    )
    print(sample_replay(request))


def _add_sample(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "sample", help="continue a text with an export or the checkpoint of a run"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--run_dir", type=Path)
    where.add_argument("--model", type=Path, help="an exported directory")
    parser.add_argument("--step", type=int, help="default: the newest complete checkpoint")
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        help="text to continue; may be given several times",
    )
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0: always the likeliest token"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens of this probability",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--chat", action="store_true", help="ask the prompt as a question, in the Harmony format"
    )
    parser.add_argument("--developer", help="with --chat: instructions for the model")
    parser.add_argument(
        "--effort", choices=("low", "medium", "high"), help="with --chat: reasoning effort"
    )
    parser.set_defaults(run=_sample)


def _doctor(options: argparse.Namespace) -> None:
    from cpt.commands.doctor import main as doctor

    doctor()


def _add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "report", help="write report.html of a run, also while it is going on"
    )
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.set_defaults(run=_report)


def _add_checkpoints(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "checkpoints", help="list the checkpoints of a run with a verdict on each"
    )
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.add_argument(
        "--verify", action="store_true", help="hash every file; default: manifests, names and sizes"
    )
    parser.set_defaults(run=_checkpoints)


def _checkpoints(options: argparse.Namespace) -> None:
    from cpt.checkpoint.listing import list_checkpoints, table

    if not options.run_dir.is_dir():
        raise ConfigError(f"--run_dir {options.run_dir} does not exist.")
    listed = list_checkpoints(options.run_dir, verify=options.verify)
    if not listed:
        print(f"{options.run_dir} holds no checkpoint yet.")
        return
    print(table(listed))
    if not any(one.good for one in listed):
        raise CheckpointError("none of them is usable.")


def _report(options: argparse.Namespace) -> None:
    from cpt.telemetry.report import write_report

    print(write_report(options.run_dir))


def _add_guard(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("guard", help="what the guard of a run decided")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    replay = actions.add_parser(
        "replay", help="make every decision again from what the run left, and compare"
    )
    replay.add_argument("--run_dir", type=Path, required=True)
    replay.set_defaults(run=_guard_replay)


def _guard_replay(options: argparse.Namespace) -> None:
    from cpt.guard.audit import check, replay

    print(check(replay(options.run_dir)))


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan", help="memory, traffic, time and the best layout, before there is a machine"
    )
    parser.add_argument("--config", type=Path, help="run YAML")
    parser.add_argument("--ds_config", type=Path, help="DeepSpeed JSON")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a YAML value"
    )
    parser.add_argument("--gpus", type=int, nargs="+", metavar="N", help="ranks, 8 per node")
    parser.add_argument("--gpu", choices=("h100", "h200", "b200"), default="h100")
    parser.add_argument(
        "--model",
        nargs="+",
        choices=("tiny", "gpt-oss-20b", "gpt-oss-120b"),
        help="architecture in place of the run YAML's model, whose weights then need not be there",
    )
    parser.add_argument(
        "--seq_len", type=int, nargs="+", metavar="TOKENS", help="default: the run YAML's"
    )
    parser.add_argument(
        "--batch_tokens", type=int, help="tokens of an optimizer step; default: as in the run YAML"
    )
    parser.add_argument(
        "--mfu", type=float, default=0.4, help="share of the peak reached while computing"
    )
    parser.add_argument(
        "--imbalance", type=float, default=1.0, help="rows of the busiest expert rank over the mean"
    )
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="share of ZeRO's traffic that compute hides"
    )
    parser.add_argument(
        "--plot", type=Path, help="of several points: SVG of speed and cost against GPUs"
    )
    mix = parser.add_argument_group(
        "instead of hardware: the largest share of the main language, from probe runs"
    )
    mix.add_argument(
        "--english_tolerance",
        type=float,
        metavar="PERCENT",
        help="largest rise of any other domain",
    )
    mix.add_argument(
        "--probe",
        type=Path,
        action="append",
        default=[],
        metavar="RUN_DIR",
        help="a short run; 3 or more",
    )
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    if options.english_tolerance is not None or options.probe:
        _plan_mix(options)
        return
    missing = [name for name in ("config", "ds_config", "gpus") if getattr(options, name) is None]
    if missing:
        raise ConfigError(
            [f"--{name} is missing. cpt plan --help lists what a plan needs." for name in missing]
        )
    from cpt.commands.plan import plan

    plan(options)


def _plan_mix(options: argparse.Namespace) -> None:
    from cpt.planning.mix_curve import describe, read_probe
    from cpt.planning.mix_curve_drawing import draw

    if options.english_tolerance is None or not options.probe:
        raise ConfigError(
            "--english_tolerance and --probe go together: a tolerance, and three or more probe runs."
        )
    probes = [read_probe(run_dir) for run_dir in options.probe]
    print(describe(probes, options.english_tolerance))
    if options.plot:
        options.plot.write_text(draw(probes, options.english_tolerance), encoding="utf-8")
        print(f"-> {options.plot}")


def _add_status(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "status", help="how far a run is; exit code 0 only if its planned last step is saved"
    )
    parser.add_argument("--run_dir", type=Path, required=True)
    parser.set_defaults(run=_status)


def _status(options: argparse.Namespace) -> None:
    from cpt.checkpoint.status import check_finished

    print(check_finished(options.run_dir))


def _export(options: argparse.Namespace) -> None:
    from cpt.export.run_export import describe_export, export_run

    folder = _checkpoint_folder(options.run_dir, options.step)
    out = export_run(options.run_dir, folder, options.out, options.format, options.score)
    print(f"{describe_export(out)}{folder} -> {out}")


def _merge(options: argparse.Namespace) -> None:
    from cpt.export.merge_sweep import merge
    from cpt.offline.model import held_out_sets

    if options.score_only and options.mix is None:
        raise ConfigError("--score_only needs --mix: there is nothing to score.")
    sets = (
        held_out_sets(options.mix, options.build_dir, options.max_documents) if options.mix else []
    )
    print(
        merge(
            options.base,
            options.tuned,
            options.alpha,
            options.out,
            sets,
            score_only=options.score_only,
        )
    )
    print(f"-> {options.out}")


def _sample(options: argparse.Namespace) -> None:
    import datetime

    from cpt.offline.sampling import Sampling, as_channels, as_text, generate, load_for_sampling
    from data_pipeline.text.harmony import Effort, encode_prompt
    from data_pipeline.text.tokenizer import encode

    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    problems = sampling.problems()
    if not all(options.prompt):
        problems.append("--prompt is empty. Give some text to continue.")
    if not options.chat and (options.developer or options.effort):
        problems.append("--developer and --effort are for --chat only.")
    if problems:
        raise ConfigError(problems)
    folder = None if options.model else _checkpoint_folder(options.run_dir, options.step)
    model = load_for_sampling(options.model, folder)
    for prompt in options.prompt:
        if options.chat:
            effort: Effort = options.effort or "medium"
            ids = encode_prompt(
                prompt, developer=options.developer, effort=effort, date=datetime.date.today()
            )
            print(f"--- {prompt}\n{as_channels(generate(model, ids, sampling))}")
        else:
            print(f"--- {prompt}\n{as_text(generate(model, encode(prompt).tolist(), sampling))}")


def _checkpoint_folder(run_dir: Path, step: int | None) -> Path:
    from cpt.checkpoint.reader import find_checkpoint, step_folder

    if not run_dir.is_dir():
        raise ConfigError(f"--run_dir {run_dir} does not exist.")
    found, rejected = find_checkpoint(run_dir, "auto" if step is None else str(step))
    for reason in rejected:
        print(f"checkpoint rejected: {reason}", file=sys.stderr)
    if found is None:
        raise CheckpointError(f"{run_dir} holds no checkpoint yet.")
    return step_folder(run_dir, found)


if __name__ == "__main__":
    sys.exit(main())
