"""One rank of the comparison of traces over layouts.

The untouched model of each scenario samples traces with its own ranks, keeps them, and is measured
on them; then the same engine is measured with other weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from cpt.deepspeed_adapter.groups import create_topology
from cpt.guard.traces.divergence import Passes, measure_divergence
from cpt.guard.traces.sampling import AskedPrompts, BaseModel, freeze_traces, kept_traces
from cpt.guard.traces.store import Tokens, TraceFolder
from cpt.job.engine_setup import build_engine, fill_weights, weight_source
from cpt.model.parameters import parameter_shapes
from cpt.model.weights.directory import DirectoryWeights
from cpt.resilience.phase import PhaseClock
from cpt.training import generate as generation
from cpt.training import loader
from cpt.training.sampling import Sampling
from data_pipeline.config.traces_config import TraceDomain
from tests.dist.cases import SEQ_LEN, Scenario, model_config
from tests.dist.worker import config_of, run_scenarios

PROMPTS = [[(7 * number + index) % 500 for index in range(2 + 35 * number)] for number in range(3)]
"""Prompts of 2, 37 and 72 tokens."""
DOMAIN = TraceDomain(name="en", language="en", path="unused", max_new_tokens=24)
"""The longest trace fills most of a row and reaches beyond several windows."""
TOP_K = 256


def run(scenario: Scenario, folder: Path) -> None:
    """Freeze traces and measure both models; the first rank leaves what it found."""
    config = config_of(scenario, folder)
    device = torch.device("cpu")
    topology = create_topology(sp_size=config.sp_size, ep_size=config.ep_size, device=device)
    engine = build_engine(config, model_config(), topology, PhaseClock())
    fill_weights(engine, weight_source(config, model_config(), topology))
    passes = Passes(
        topology=topology, micro_batch_size=config.micro_batch_size, seq_len=config.train.seq_len
    )

    def sample(
        prompts: Sequence[Tokens], drawn_as: Sampling, numbers: Sequence[int]
    ) -> list[Tokens]:
        return generation.generate(engine, prompts, drawn_as, numbers=numbers, stop_ids=[509])

    traces = TraceFolder(folder / scenario.name)
    asked = AskedPrompts(domain=DOMAIN, prompts=PROMPTS)
    base = BaseModel(model=engine, name="base", weights="base", top_k=TOP_K)
    freeze_traces(asked, base, sample, traces, passes)
    kept = kept_traces(traces, "en", topology.control_group)
    assert kept is not None
    own = measure_divergence(kept.traces, traces.targets(kept), engine, passes)
    moved = DirectoryWeights(folder / "moved", parameter_shapes(model_config()))
    fill_weights(engine, moved)
    other = measure_divergence(kept.traces, traces.targets(kept), engine, passes)
    if topology.rank == 0:
        found = {"own": own.text.tolist(), "moved": other.text.tolist()}
        (folder / f"{scenario.name}.json").write_text(json.dumps(found))
    engine.deepspeed.destroy()
    dist.barrier()


if __name__ == "__main__":
    assert max(map(len, PROMPTS)) + DOMAIN.max_new_tokens <= SEQ_LEN
    # the small vocabulary ends before the token that fillers are made of
    loader.END_OF_TEXT = 511
    generation.END_OF_TEXT = 511
    run_scenarios(run)
