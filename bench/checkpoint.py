"""Measure what a save takes from training, by the way in which it is made, in one run.

    python bench/checkpoint.py [--ranks 2] [--steps 6] [--rounds 3] [--layers 4] [--hidden 512]
        [--frozen] [--folder DIR]

Ranks train a gpt-oss of random weights on random tokens with ZeRO-3.  Every round times the same
number of steps without a save, and with one after the first step, made in each of these ways:

    synchronous   training stands still until the checkpoint is complete
    copy first    training stands still until the state is copied; the copy is written beside it
    copy          the state is copied beside the next step, and its update waits for the copy
    stream        the state is written beside the next step, and its update waits for that

All but the first are timed until they are published, so that what the writer takes from the steps
beside it is counted.  The report gives the time in which training stood still, and how much longer
the steps took than without a save.  Figures and ratios are medians over the rounds.  With
`--frozen` the experts are not trained, and their file is linked from the second save on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SEQ_LEN = 512
KINDS = ("none", "synchronous", "copy first", "copy", "stream")
"""The kind of save in a measurement."""


def train_and_save(options: argparse.Namespace) -> None:
    """Train as one rank; rank 0 prints a JSON line of seconds by round and kind."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from transformers import GptOssConfig

    from cpt.checkpoint.saver import Saver
    from cpt.config import CheckpointSection, LaunchInfo, RunYaml, resolve
    from cpt.deepspeed_adapter.groups import create_topology, init_distributed
    from cpt.job.engine_setup import build_engine, fill_weights
    from cpt.model.configuration import PRESETS
    from cpt.model.weights.random_init import RandomWeights
    from cpt.resilience.phase import PhaseClock
    from cpt.training.engine import Votes
    from cpt.training.loader import make_micro_batch
    from data_pipeline.config.strict_yaml import parse_yaml, read_file
    from data_pipeline.dataset import PackedRow

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.ranks))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    init_distributed(device)
    shape = {
        **PRESETS["tiny"],
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "vocab_size": 32_000,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    model_config = GptOssConfig(**shape)
    run = f"""
model: {{init: tiny}}
data: {{mix: unused.yaml}}
train: {{seq_len: {SEQ_LEN}, global_batch_size: {options.ranks}, total_steps: 100000, lr: 1e-4,
    freeze: {["experts"] if options.frozen else []}}}
"""
    ds_json = '{"zero_optimization": {"stage": 3}, "sequence_parallel_size": 1}'
    launch = LaunchInfo(world_size=options.ranks, local_world_size=options.ranks)
    run_yaml = read_file(RunYaml, parse_yaml(run, "run"))
    config = resolve(run_yaml, parse_yaml(ds_json, "ds"), model_config, launch)
    topology = create_topology(sp_size=1, ep_size=1, device=device)
    engine = build_engine(config, model_config, topology, PhaseClock())
    fill_weights(engine, RandomWeights(1, 0.02))
    generator = np.random.default_rng(topology.rank)
    tokens = generator.integers(2, 32_000, size=SEQ_LEN + 1)
    row = PackedRow(
        input_ids=tokens[:-1],
        labels=tokens[1:],
        position_ids=np.arange(SEQ_LEN),
        bounds=[0, SEQ_LEN],
        documents=np.zeros(1, dtype=np.int64),
    )
    batch = make_micro_batch([row], [0], topology)
    folder = Path(options.folder)
    section = CheckpointSection(async_save=True, interval_steps=1)
    saver = Saver(folder, engine.deepspeed, topology, section)
    predicted = [SEQ_LEN * options.ranks]
    done = 0

    def vote() -> Votes:
        return Votes(save_settled=saver.own_part_is_settled())

    def steps(kind: str) -> tuple[float, float]:
        """Return the seconds of all steps, and those in which training stood still for a save."""
        nonlocal done
        published = None
        dist.barrier(topology.control_group)
        began = time.perf_counter()
        for number in range(options.steps):
            done += 1
            result = engine.step([batch], predicted, step=done, votes=vote)
            published = saver.advance(result.votes.save_settled) or published
            if number == 0 and kind == "synchronous":
                published = saver.save_now(done, {})
            elif number == 0 and kind != "none":
                saver.way = "stream" if kind == "stream" else "copy"
                saver.start(done, {})
                if kind == "copy first":
                    engine.deepspeed.state_reading.wait()
        published = saver.finish() or published
        seconds = time.perf_counter() - began
        saver.close()
        return seconds, published.blocked_seconds if published else 0.0

    for kind in KINDS:  # first touches of memory and disk
        steps(kind)
    rounds = []
    for _ in range(options.rounds):
        rounds.append({kind: steps(kind) for kind in KINDS})
    size = sum(file.stat().st_size for file in max(folder.glob("checkpoints/step-*")).iterdir())
    if topology.rank == 0:
        print("RESULT " + json.dumps({"rounds": rounds, "bytes": size, "steps": options.steps}))
    dist.barrier(topology.control_group)
    os._exit(0)


def report(result: dict[str, Any]) -> None:
    """Print medians for people."""
    rounds = result["rounds"]
    print(f"checkpoint of {result['bytes'] / 1e6:.0f} MB, {len(rounds)} rounds")
    plain = statistics.median(one["none"][0] for one in rounds)
    print(f"{result['steps']} steps without a save: median {plain:.2f} s")
    head = f"{'way':12} {'training stands still, s':>28} {'of synchronous':>15}"
    print(f"{head} {'the steps take longer by, s':>30}")
    for kind in KINDS[1:]:
        still = [one[kind][1] for one in rounds]
        cost = [one[kind][0] - one["none"][0] for one in rounds]
        ratios = [one[kind][1] / one["synchronous"][1] for one in rounds]
        line = f"{kind:12} {spread(still):>28} {statistics.median(ratios):>15.3f}"
        print(f"{line} {spread(cost):>30}")


def spread(values: list[float]) -> str:
    """Return median, smallest and largest for people."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Start the ranks and print their report, or be one of the ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--frozen", action="store_true", help="do not train the experts")
    parser.add_argument("--folder", help="where to save; default: the temporary folder")
    options = parser.parse_args()
    if "RANK" in os.environ:
        train_and_save(options)
        return
    from tests.support.launcher import free_port, rank_environment

    folder = options.folder or tempfile.mkdtemp(prefix="bench-checkpoint-")
    try:
        port = free_port()
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        pipes = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        ranks = []
        for rank in range(options.ranks):
            environment = rank_environment(rank, options.ranks, port)
            environment.pop("CUDA_VISIBLE_DEVICES")  # which hides the GPUs
            ranks.append(subprocess.Popen(command, env=environment, **pipes))
        outputs = [rank.communicate()[0] for rank in ranks]
        line = next(line for line in outputs[0].splitlines() if line.startswith("RESULT "))
        report(json.loads(line.removeprefix("RESULT ")))
    finally:
        shutil.rmtree(Path(folder) / "checkpoints", ignore_errors=True)


if __name__ == "__main__":
    main()
