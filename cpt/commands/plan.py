"""`cpt plan`: predict a run's memory and speed, or the largest share that a language may have."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.shared_options import add_overrides
from cpt.errors import ConfigError
from data_pipeline.console.say import say

GPU_NAMES = (
    "h100",
    "h100-94gb",
    "h200",
    "b200",
    "gh200-96gb",
    "gh200-144gb",
    "a100-80gb",
    "l40s",
    "rtx4090",
)
"""Keys of `cpt.planning.hardware.GPUS`, whose import would cost every command a second."""
CLUSTER_NAMES = ("abci3", "tsubame4", "miyabi")
"""Keys of `cpt.planning.hardware.CLUSTERS`."""


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "plan", help="memory, traffic, time and the best layout, before there is a machine"
    )
    _add_hardware_options(parser)
    mix = parser.add_argument_group(
        "instead of hardware: the largest share of the main language, from probe runs"
    )
    mix.add_argument(
        "--english_tolerance",
        type=float,
        metavar="PERCENT",
        help="largest rise of bits per byte in any other domain",
    )
    mix.add_argument(
        "--probe",
        type=Path,
        action="append",
        default=[],
        metavar="RUN_DIR",
        help="a short run; five or more, one share of replay with two seeds of the mix",
    )
    mix.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="length of the planned run, which takes probes of two lengths; default: as the probes",
    )
    parser.set_defaults(run=_run)


def _add_hardware_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, help="run YAML")
    parser.add_argument("--ds_config", type=Path, help="DeepSpeed JSON")
    add_overrides(parser)
    parser.add_argument("--gpus", type=int, nargs="+", metavar="N", help="ranks of the run")
    _add_node_options(parser)
    parser.add_argument(
        "--model",
        nargs="+",
        choices=("tiny", "gpt-oss-20b", "gpt-oss-120b"),
        help="architecture in place of the run YAML's model, whose weights then need not be there",
    )
    parser.add_argument(
        "--seq_len", type=int, nargs="+", metavar="TOKENS", help="default: as in the run YAML"
    )
    parser.add_argument(
        "--batch_tokens", type=int, help="tokens of an optimizer step; default: as in the run YAML"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        help="share of the peak reached while computing; default: every part is computed",
    )
    routing = parser.add_mutually_exclusive_group()
    routing.add_argument(
        "--imbalance",
        type=float,
        default=1.0,
        help="rows of the busiest expert rank over the mean; default: 1, balanced routing",
    )
    routing.add_argument(
        "--routing_of",
        type=Path,
        metavar="RUN_DIR",
        help="a run whose measured routing is taken in place of --imbalance",
    )
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="share of ZeRO's traffic that compute hides"
    )
    parser.add_argument(
        "--plot",
        type=Path,
        help="SVG file: speed and cost against GPUs, for a plan of several points",
    )


def _add_node_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=GPU_NAMES, help="kind of GPU; default: h100")
    parser.add_argument(
        "--cluster",
        choices=CLUSTER_NAMES,
        help="nodes of a known cluster; the other options about GPUs and nodes change them",
    )
    parser.add_argument(
        "--ranks_per_node",
        type=int,
        metavar="N",
        help="ranks that NVLink connects, or PCIe where there is none; default: 8, h100-94gb, l40s "
        "and rtx4090 4, gh200 1",
    )
    parser.add_argument(
        "--fabric_gbit",
        type=float,
        metavar="GBIT",
        help="rate of a node to other nodes in Gbit/s, in one direction: the sum of its adapters; "
        "default: 400 per rank",
    )
    parser.add_argument(
        "--host_gb",
        "--host_memory_gb",
        dest="host_gb",
        type=float,
        metavar="GB",
        help="memory of a node's host, in 10^9 bytes; default: 250 per rank, gh200 480",
    )
    parser.add_argument(
        "--nvme_gb",
        type=float,
        metavar="GB",
        help="space for state on the NVMe disks of a node, in 10^9 bytes; default: none is used",
    )
    parser.add_argument(
        "--nvme_gb_per_second",
        type=float,
        metavar="GB",
        help="what these disks read and write in a second, together; default: 3 per rank",
    )


def _run(options: argparse.Namespace) -> None:
    if options.english_tolerance is not None or options.probe:
        _plan_mix(options)
        return
    problems = []
    for name in ("config", "ds_config", "gpus"):
        if getattr(options, name) is None:
            problems.append(f"--{name} is missing. cpt plan --help lists what a plan needs.")
    if problems:
        raise ConfigError(problems)
    from cpt.commands.plan_report import plan

    plan(options)


def _plan_mix(options: argparse.Namespace) -> None:
    from cpt.planning.mix_answer import describe
    from cpt.planning.mix_curve_drawing import draw
    from cpt.planning.mix_probe import read_probes

    if options.english_tolerance is None or not options.probe:
        raise ConfigError(
            "--english_tolerance and --probe go together: give a tolerance, and five or more "
            "probe runs."
        )
    probes = read_probes(options.probe)
    say(describe(probes, options.english_tolerance, options.steps))
    if options.plot:
        figure = draw(probes, options.english_tolerance, options.steps)
        options.plot.write_text(figure, encoding="utf-8")
        say(f"-> {options.plot}")
