"""Prove on a scaled-down node that a model whose state fills the host memory trains, saves, is
killed, resumes and exports, and that a copy of the state for saves does not fit beside it.

    python bench/prove/one_node.py [--layers 4] [--state fp32 bf16] [--folder runs/one_node]

The node has 2 TB of host memory for the 116.8 G parameters of gpt-oss-120b, 17.1 bytes a parameter.
Here one process trains a small gpt-oss, whose first weights come from an export in bf16, with its
optimizer state on the host.  What is on the GPU of a node is in the same memory here, so the limit
is 17.1 bytes a parameter and what a run without saves takes besides gradients, master weights and
moments (weights, activations, libraries).

Each phase is a process of its own in a memory cgroup with that limit, which counts the pages of
files, too.  For each setting of the optimizer state:

    copy      saves copy the state to memory: the kernel kills the run
    stream    saves write the state as it lies; a run is killed in the save of step 4, resumes and
              comes to the losses of a run without limit, saves or kill, bit for bit
    export    its last checkpoint is exported in bf16 and in MXFP4

The script ends with 1 if a phase does other than that, and prints the largest anonymous memory of
each (memory that belongs to no file, sampled every 5 ms).  It needs the right to make a cgroup.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "prove")]
from nvme import AnonymousPeak, limited, remove, run_within  # noqa: E402
from step_parts.cases import OURS, Case, model_config, row  # noqa: E402

NODE_BYTES_PER_PARAMETER = 2e12 / 116.8e9
STATE_BYTES = {"fp32": 16, "bf16": 12}
"""Bytes a parameter of master weight, two moments and fp32 gradient on the host."""
TOKENS = 256
EXPERTS = 32
STEPS = 6
INTERVAL_STEPS = 2
KILLED_SAVE = 4


def case_of(options: argparse.Namespace) -> Case:
    """Return the model and its rows."""
    return Case(
        contender=OURS,
        tokens=TOKENS,
        ranks=1,
        steps=STEPS,
        threads=1,
        experts=EXPERTS,
        layers=options.layers,
        clock="wall",
    )


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Export random weights in bf16, the release that the runs start from."""
    from step_parts.ours import build

    from cpt.checkpoint.saver import Saver
    from cpt.config import CheckpointSection
    from cpt.export.huggingface import export_checkpoint

    case = case_of(options)
    engine, topology = build(case)
    folder = Path(options.folder) / "source"
    saver = Saver(folder, engine.deepspeed, topology, CheckpointSection())
    done = saver.save_now(0, {"model_config": model_config(case).to_dict()})
    export_checkpoint(done.folder, release_of(options), "bf16")
    parameters = sum(parameter.ds_numel for parameter in engine.deepspeed.module.parameters())
    return {"parameters": parameters}


def release_of(options: argparse.Namespace) -> Path:
    """Return the directory of the weights that the runs start from."""
    return Path(options.folder) / "release"


def build_offloaded(options: argparse.Namespace) -> tuple[Any, Any]:
    """Build an engine with its optimizer state on the host; its weights have no values."""
    import torch

    from cpt.config import LaunchInfo, RunYaml, resolve
    from cpt.deepspeed_adapter.groups import create_topology, init_distributed
    from cpt.job.engine_setup import build_engine
    from cpt.resilience.phase import PhaseClock
    from data_pipeline.config.strict_yaml import parse_yaml, read_file

    init_distributed(torch.device("cpu"))
    train = {"seq_len": TOKENS, "global_batch_size": 1, "total_steps": 1000, "lr": 1e-4}
    if options.state[0] != "fp32":
        train["optimizer_state"] = options.state[0]
    run = {"model": {"path": str(release_of(options).resolve())}, "train": train}
    run["data"] = {"mix": "unused.yaml"}
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    engine_json = parse_yaml(json.dumps({"zero_optimization": zero}), "ds.json")
    run_yaml = read_file(RunYaml, parse_yaml(json.dumps(run), "run.yaml"))
    model = model_config(case_of(options))
    info = LaunchInfo(world_size=1, local_world_size=1)
    config = resolve(run_yaml, engine_json, model, info)
    topology = create_topology(sp_size=1, ep_size=1, device=torch.device("cpu"))
    engine = build_engine(config, model, topology, PhaseClock())
    return engine, (config, model, topology)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train from the release, or from the newest checkpoint if there is one."""
    from cpt.checkpoint.loading import load_checkpoint
    from cpt.checkpoint.saver import Saver
    from cpt.config import CheckpointSection
    from cpt.job.engine_setup import fill_weights, weight_source
    from cpt.training.engine import Votes
    from cpt.training.loader import make_micro_batch

    peak = options.peak
    before = peak.num_bytes
    engine, (config, model, topology) = build_offloaded(options)
    run_dir = Path(options.folder) / f"run-{options.state[0]}-{options.way}"
    loaded = load_checkpoint(run_dir, engine.deepspeed, topology, "auto")
    if loaded is None:
        fill_weights(engine, weight_source(config, model, topology))
    first = 0 if loaded is None else loaded.step
    start_up = peak.num_bytes - before
    section = CheckpointSection(interval_steps=INTERVAL_STEPS, async_save="stream")
    saver = Saver(run_dir, engine.deepspeed, topology, section)
    if options.way == "copy":
        saver.way = "copy"
    state = {"model_config": model.to_dict()}
    losses = {}
    case = case_of(options)

    def votes() -> Votes:
        return Votes(save_settled=saver.own_part_is_settled())

    for step in range(first + 1, STEPS + 1):
        batch = make_micro_batch([row(case, step)], [0], topology)
        result = engine.step([batch], [TOKENS], step=step, votes=votes)
        losses[step] = result.loss
        saver.advance(result.votes.save_settled)
        if options.way != "none" and step % INTERVAL_STEPS == 0 and step < STEPS:
            saver.finish()
            saver.start(step, state)
    saver.finish()
    if options.way != "none":
        saver.save_now(STEPS, state)
    return {"losses": losses, "first": first, "start_up": start_up}


def export(options: argparse.Namespace) -> dict[str, Any]:
    """Export the last checkpoint in both formats."""
    from cpt.checkpoint.reader import step_folder
    from cpt.export.huggingface import export_checkpoint

    run_dir = Path(options.folder) / f"run-{options.state[0]}-stream"
    for name in ("bf16", "mxfp4"):
        out = run_dir / f"export-{name}"
        shutil.rmtree(out, ignore_errors=True)
        export_checkpoint(step_folder(run_dir, STEPS), out, name)
    return {}


PHASES = {"prepare": prepare, "train": train, "export": export}


def run(
    options: argparse.Namespace,
    phase: str,
    *arguments: str,
    cgroup: Path | None = None,
    fault: str = "",
) -> tuple[int, dict[str, Any]]:
    """Run a phase in a process of its own, and return its exit code and what it printed."""
    command = [sys.executable, __file__, "--phase", phase, "--folder", options.folder]
    command += ["--layers", str(options.layers), *arguments]

    os.sync()  # pages that wait to be written count as memory of the cgroup
    done = run_within(cgroup, command, CPT_ALLOW_FAULTS="1", CPT_FAULT=fault)
    if done.returncode > 0:
        print(done.stderr[-3000:], file=sys.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(lines[-1].removeprefix("RESULT ")) if lines else {}
    if "fault injected" in done.stderr:
        found["fault"] = True
    return done.returncode, found


def tell(what: str, code: int, found: dict[str, Any]) -> None:
    """Print a line on a phase."""
    outcome = f"exit code {code}"
    if code == -signal.SIGKILL:
        outcome = "killed by itself" if "fault" in found else "killed by the kernel"
    peak = ""
    if "anonymous" in found:
        peak = f", {found['anonymous'] / 2**20:,.0f} MiB anonymous"
    start_up = f" ({found['start_up'] / 2**20:,.0f} at start-up)" if "start_up" in found else ""
    print(f"{what:<42} {outcome}{peak}{start_up}", flush=True)


def prove(options: argparse.Namespace, state: str, parameters: int) -> bool:
    """Try one setting of the optimizer state, and return whether all went as it should."""
    setting = ("--state", state)
    code, free = run(options, "train", *setting, "--way", "none")
    tell(f"{state}, no limit, no saves", code, free)
    if code != 0:
        return False
    besides = free["anonymous"] - STATE_BYTES[state] * parameters
    limit = int(NODE_BYTES_PER_PARAMETER * parameters + besides)
    print(f"limit {limit / 2**20:,.0f} MiB, of which {besides / 2**20:,.0f} besides the node's")
    cgroup = limited(limit)
    if cgroup is None:
        print("no memory cgroup can be made here: the limit was not tried")
        return False
    stream = (*setting, "--way", "stream")
    try:
        copied, found = run(options, "train", *setting, "--way", "copy", cgroup=cgroup)
        tell(f"{state}, copy", copied, found)
        fault = f"save_write:0:{KILLED_SAVE}:kill"
        killed, planned = run(options, "train", *stream, cgroup=cgroup, fault=fault)
        tell(f"{state}, stream, killed in a save", killed, planned)
        code, again = run(options, "train", *stream, cgroup=cgroup)
        tell(f"{state}, stream, resumed after step {again.get('first')}", code, again)
        exported, found = run(options, "export", *setting, cgroup=cgroup)
        tell(f"{state}, export in bf16 and MXFP4", exported, found)
    finally:
        remove(cgroup)
    same = all(free["losses"][step] == loss for step, loss in again.get("losses", {}).items())
    print(f"losses of steps {', '.join(again.get('losses', {}))} as without a limit: {same}")
    resumed = "fault" in planned and again.get("first") == KILLED_SAVE - INTERVAL_STEPS
    outcomes = (copied, killed, code, exported)
    return same and resumed and outcomes == (-signal.SIGKILL, -signal.SIGKILL, 0, 0)


def main() -> None:
    """Run all phases and print what each took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--state", nargs="+", choices=sorted(STATE_BYTES), default=["fp32", "bf16"])
    parser.add_argument("--folder", default="runs/one_node")
    parser.add_argument("--phase", choices=sorted(PHASES), help=argparse.SUPPRESS)
    parser.add_argument("--way", default="none", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        options.peak = AnonymousPeak()
        options.peak.start()
        found = PHASES[options.phase](options)
        print("RESULT " + json.dumps({**found, "anonymous": options.peak.num_bytes}), flush=True)
        os._exit(0)
    shutil.rmtree(options.folder, ignore_errors=True)
    code, found = run(options, "prepare")
    if code != 0:
        sys.exit(f"the release could not be written: exit code {code}")
    parameters = found["parameters"]
    print(f"{parameters / 1e6:.1f} M parameters")
    outcomes = [prove(options, state, parameters) for state in options.state]
    shutil.rmtree(options.folder, ignore_errors=True)
    sys.exit(not all(outcomes))


if __name__ == "__main__":
    main()
