"""One rehearsal: the real patched model and the real training engine on fake CUDA tensors.

DeepSpeed's engine has a stand-in, because it needs processes; so have the process groups
(groups.py). Everything else is the code that trains.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import GptOssConfig

from cpt.config import LaunchInfo, RunConfig, RunYaml, resolve
from cpt.deepspeed_adapter.state_reading import StateReading
from cpt.guard.score import ScoredSet, score_domain
from cpt.model import gpt_oss
from cpt.model.adapters.attach import attach_adapters
from cpt.model.adapters.layout import adapted_matrices
from cpt.model.attention.function import FoldedSinks
from cpt.model.attention.torch_flash import TorchFlashKernel
from cpt.model.configuration import PRESETS
from cpt.model.decoding import KeyValueCache, PromptPass, TokenPass
from cpt.model.experts.packed_base import materialize_packed, pack
from cpt.model.gpt_oss import GptOssForCPT
from cpt.model.kernels.availability import fused_kernels_run_on
from cpt.model.products.layers import ChosenProducts, eight_bit_layers, put_products
from cpt.model.products.recipe import EightBit
from cpt.parallel.halo import WindowHalo
from cpt.parallel.topology import Topology
from cpt.parallel.ulysses import Ulysses
from cpt.resilience.phase import PhaseClock
from cpt.storage.transfer import to_device
from cpt.training import engine as engine_module
from cpt.training import kl_targets
from cpt.training.engine import TrainingEngine
from cpt.training.kl_target_format import (
    Sidecar,
    TargetFileReader,
    TargetFileWriter,
    TargetsOfSource,
    write_sidecar,
)
from cpt.training.kl_targets import KLTargets, LabeledSlots
from cpt.training.loader import MicroBatch, cut_rows, span_of_rank
from cpt.training.read_ahead import ReadAhead
from cpt.training.sampling import Sampling, draw_tokens
from data_pipeline.config.strict_yaml import parse_yaml, read_file
from data_pipeline.dataset import IGNORED_LABEL, PackedRow
from tests.support.gpu_rehearsal.audit import Audit
from tests.support.gpu_rehearsal.groups import Collectives
from tests.support.gpu_rehearsal.planted import planted
from tests.support.gpu_rehearsal.shapes import Scenario

LISTED_TOKENS = 64
"""k of the KL targets."""
GRADIENT_ELEMENTS = 10_000_000
"""Elements of the stand-in's flat gradient buffer."""


class StandInDeepSpeed:
    """Stands in for DeepSpeed's engine under ZeRO-3: calls the model and its backward."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self.module = model
        self.state_reading = StateReading()
        flat = torch.empty(GRADIENT_ELEMENTS, device="cuda")
        self.optimizer = SimpleNamespace(
            averaged_gradients={0: list(flat.chunk(4))},
            grad_partitions_flat_buffer=flat,
            fp32_partitioned_groups_flat=[flat],
            fp16_partitioned_groups_flat=[flat.to(torch.bfloat16)],
            fp16_groups=[[]],
            offload_optimizer=False,
            param_groups=optimizer.param_groups,
            optimizer=optimizer,
        )

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool) -> None:
        """Compute the gradients."""
        loss.backward()

    def zero_optimization_stage(self) -> int:
        """Return 3."""
        return 3

    def step(self) -> None:
        """Do nothing: the update is DeepSpeed's."""

    def was_step_applied(self) -> bool:
        """Return that it was."""
        return True

    def eval(self) -> None:
        """Put the model into evaluation mode."""
        self.module.eval()

    def train(self) -> None:
        """Put the model into training mode."""
        self.module.train()


def run_config(scenario: Scenario, model_config: GptOssConfig) -> RunConfig:
    """Return the resolved configuration of a run in this shape."""
    coefficient = 0.01 if scenario.router_watch else 0.0
    model = {
        "init": scenario.preset,
        "activation_checkpointing": scenario.checkpointing,
        "offload_checkpoints": scenario.offload,
        "expert_recompute": scenario.expert_recompute,
        "expert_overlap": scenario.expert_overlap,
        "router_aux_loss_coef": coefficient,
        "router_z_loss_coef": coefficient,
    }
    rows = scenario.world_size // scenario.sp_size * scenario.micro_batches
    train: dict[str, Any] = {
        "seq_len": scenario.seq_len,
        "micro_batch_size": 1,
        "global_batch_size": rows,
        "total_steps": 10,
        "schedule": "constant",
        "lr": 1e-5,
        "dtype": "bf16",
    }
    if scenario.rounding:
        train["quantize"] = {"experts": "mxfp4", "start_step": 0}
    if scenario.eight_bit:
        scaling = scenario.eight_bit
        train["products"] = {"experts": "fp8", "attention": "fp8", "scaling": scaling}
    if scenario.kl_targets:
        train |= {"kl_targets": "targets", "kl_weight": 0.5}
    adapter = {"kind": "lora", "base": "mxfp4"} if scenario.packed_base else {}
    content = {"model": model, "data": {"mix": "unused.yaml"}, "train": train, "adapter": adapter}
    text = json.dumps(content)
    engine = {
        "zero_optimization": {"stage": 3},
        "sequence_parallel_size": scenario.sp_size,
    }
    if scenario.ep_size > 1:
        engine["expert_parallel"] = {
            "enabled": True,
            "autoep_size": scenario.ep_size,
            "preset_model": "gpt_oss",
        }
    return resolve(
        read_file(RunYaml, parse_yaml(text, "run")),
        parse_yaml(json.dumps(engine), "engine"),
        model_config,
        LaunchInfo(world_size=scenario.world_size, local_world_size=scenario.world_size),
    )


def packed_row(scenario: Scenario) -> PackedRow:
    """Return a row of documents of about one length."""
    length = scenario.seq_len
    bounds = [index * length // scenario.documents for index in range(scenario.documents + 1)]
    labels = np.zeros(length, np.int64)
    if scenario.few_labels:
        labels[::2] = IGNORED_LABEL
    return PackedRow(
        input_ids=np.zeros(length, np.int64),
        labels=labels,
        position_ids=np.arange(length, dtype=np.int64),
        bounds=bounds,
        documents=np.arange(scenario.documents),
    )


def open_targets(scenario: Scenario, folder: Path) -> KLTargets:
    """Write KL targets for one row and open them."""
    tokens = scenario.seq_len
    writer = TargetFileWriter(folder, "text", tokens, LISTED_TOKENS)
    ids = torch.arange(LISTED_TOKENS).repeat(tokens, 1)
    writer.append(ids, torch.zeros(tokens, LISTED_TOKENS + 1))
    writer.finish()
    writer.close()
    source = TargetsOfSource(rows=1, tokens=tokens, row_hash="", xxh3="")
    sidecar = Sidecar(
        base_model="", computed_in="bf16", build="", top_k=LISTED_TOKENS, sources={"text": source}
    )
    write_sidecar(folder, sidecar)
    kl_targets.TargetFileReader = _FileReader
    return KLTargets(folder, ["text"], {"text": np.array([tokens])})


class _FileReader(TargetFileReader):
    """Reads real tensors, whatever mode is on."""

    def read(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and log-probabilities."""
        with unset_fake_temporarily():
            return super().read(begin, end)


class Rehearsal:
    """A scenario, built and ready to run."""

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        self._folder = folder
        rank = 1 if scenario.world_size > 1 else 0
        self._collectives = Collectives(
            rank, scenario.world_size, scenario.sp_size, scenario.ep_size
        )
        self._clock = PhaseClock()
        self._stage = "load"
        self._fused = False
        self._tokens = scenario.tokens
        self.audit = Audit(self._host_value, self._present_stage)
        self.model_config = GptOssConfig(
            **{**PRESETS[scenario.preset], "num_hidden_layers": scenario.layers}
        )

    def run(self) -> dict[str, Any]:
        """Run everything and return what was found, as JSON holds it."""
        error = None
        scenario = self.scenario
        targets = open_targets(scenario, self._folder) if scenario.kl_targets else None
        with planted(scenario.fault):
            try:
                self._run(targets)
            except Exception as problem:
                error = f"{type(problem).__name__}: {problem}\n{_own_lines(problem)}"
        return {
            "scenario": asdict(scenario),
            "error": error,
            "fused": self._fused,
            "triton_modules": [name for name in sys.modules if "kernels.triton_" in name],
            "parts": self._parts(),
            "waits": [[str(at), asdict(at), count] for at, count in self.audit.waits.items()],
            "mixes": [str(mix) for mix in self.audit.mixes],
            "wrong_collectives": self._collectives.wrong,
            "collectives": dict(self._collectives.calls),
            "operators": dict(self.audit.operators.most_common()),
        }

    def _run(self, targets: KLTargets | None) -> None:
        scenario = self.scenario
        self._collectives.install()
        topology = self._collectives.topology()
        model = gpt_oss.skeleton(self.model_config, torch.bfloat16)
        in_halves = scenario.expert_overlap == "halves"
        gpt_oss.patch(model, topology, experts_in_halves=in_halves)
        if scenario.packed_base:
            pack(model)
            adapter = run_config(scenario, self.model_config).adapter
            adapted = adapted_matrices(adapter, self.model_config)
            attach_adapters(model, adapted, adapter.scale, topology.ep_size)
        if scenario.eight_bit:
            put_products(model, self._chosen_products())
        with FakeTensorMode(allow_non_fake_inputs=True):
            self._fused = fused_kernels_run_on(torch.empty(1, device=topology.device))
            engine = self._build_engine(model, topology)
            self._step(engine, targets)
            if scenario.evaluates:
                self._evaluate(engine)

    def _chosen_products(self) -> ChosenProducts:
        """Return the products of the scenario as the kernels of torch compute them."""
        section = run_config(self.scenario, self.model_config).train.products
        eight_bit = EightBit("blocks" if section.scaling == "blocks" else "rows", by_kernel=True)
        layers = eight_bit_layers(section, self.model_config.num_hidden_layers)
        return ChosenProducts(experts=eight_bit, attention=eight_bit, layers=layers)

    def _step(self, engine: TrainingEngine, targets: KLTargets | None) -> None:
        scenario = self.scenario
        with self.audit:
            batches = self._batches(engine, targets)
            self._stage = "step"
            engine.step(
                batches,
                [scenario.tokens * scenario.micro_batches],
                step=1,
                measure_routers=scenario.router_watch,
            )
        for name, parameter in engine.deepspeed.module.named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.is_cuda, f"the gradient of {name} is on the host"

    def _evaluate(self, engine: TrainingEngine) -> None:
        """Score a domain and continue texts as the guard does; the costs are not counted."""
        topology = engine.topology
        row = packed_row(self.scenario)
        domain = SimpleNamespace(
            name="text",
            language="en",
            num_rows=1,
            read_row=lambda index: row,
            num_documents=len(row.documents),
            document_bytes=np.ones(len(row.documents)),
        )
        totals = self.audit.totals
        self.audit.totals = {}
        with self.audit:
            self._stage = "score"
            score_domain(cast(ScoredSet, domain), engine, topology, micro_batch_size=1)
            self._stage = "sample"
            self._decode(engine)
        self.audit.totals = totals

    def _decode(self, engine: TrainingEngine) -> None:
        """Read prompts, past the window and shorter, and draw a token of each, then another."""
        device = engine.topology.device
        window = self.model_config.sliding_window
        num_rows = 2 * self.scenario.ep_size
        sampling = Sampling(temperature=1.0, top_p=0.9)
        uniforms = to_device(torch.zeros(2, num_rows, dtype=torch.float64), device)
        lengths = [window + 8, *[8] * (num_rows - 1)]
        longest = max(lengths) + 1
        cache = KeyValueCache(
            self.model_config, num_rows, engine.dtype, device, longest_tokens=longest
        )
        cache.reserve(longest)
        self._tokens = sum(lengths)
        prompts = [[1] * length for length in lengths]
        logits = engine.next_token_logits(PromptPass(cache, prompts, first_row=0))
        tokens = draw_tokens(logits, sampling, uniforms[0])
        self._tokens = num_rows
        positions = to_device(torch.tensor(lengths), device)
        logits = engine.next_token_logits(TokenPass(cache, tokens, positions, max(lengths) + 1))
        draw_tokens(logits, sampling, uniforms[1])
        cache.move([num_rows - 1], [0])

    def _build_engine(self, model: GptOssForCPT, topology: Topology) -> TrainingEngine:
        scenario = self.scenario
        gpt_oss.materialize(model, topology.device)
        materialize_packed(model, topology.device)
        exchange = None
        if scenario.sp_size > 1:
            exchange = Ulysses(topology, WindowHalo(topology, self.model_config.sliding_window))
        if scenario.rounding:
            for parameter in model.parameters():
                # the part of a rank that no other one shares
                parameter.ds_tensor = parameter.detach()  # type: ignore[attr-defined]
        engine_module.initialize = _stand_in_engine
        engine = TrainingEngine(
            model,
            run_config(scenario, self.model_config),
            topology,
            FoldedSinks(TorchFlashKernel()),
            exchange,
            self._clock,
        )
        if scenario.router_watch:
            for layer in model.model.layers:
                router = layer.mlp.router
                engine.router_watch.original.append(
                    (torch.empty_like(router.weight), torch.empty_like(router.bias))
                )
        return engine

    def _batches(self, engine: TrainingEngine, targets: KLTargets | None) -> Iterator[MicroBatch]:
        """Yield the micro batches of a step, each read on a thread while another is computed."""
        topology = engine.topology

        def read(number: int) -> MicroBatch:
            found = None
            row = packed_row(self.scenario)
            if targets is not None:
                span = span_of_rank(self.scenario.seq_len, topology)
                labels = row.labels[span]
                part = LabeledSlots(source=0, row=0, labels=labels, labels_before=span.start)
                found = targets.of_rows([part])
            return cut_rows([row], [0], topology, found)

        reader = ReadAhead(read)
        for number in range(self.scenario.micro_batches):
            batch = reader.take(number)
            reader.begin(number + 1)
            yield engine.send(batch)
        reader.close()

    def _host_value(self, tensor: torch.Tensor) -> int:
        """Return what the host reads: balanced counts of rows for the ranks, else 1.

        Experts in halves read a tensor of (halves, directions, ranks), others (directions, ranks).
        """
        ep_size = self.scenario.ep_size
        if ep_size == 1 or tuple(tensor.shape[-1:]) != (ep_size,):
            return 1
        rows = self._tokens * self.model_config.num_experts_per_tok
        exchanges = tensor.shape[0] if tensor.ndim == 3 else 1
        return rows // ep_size // exchanges

    def _present_stage(self) -> str:
        if self._stage != "step":
            return self._stage
        if self._clock.now().phase in ("load", "forward", "backward"):
            return "micro step"
        return "optimizer step"

    def _parts(self) -> dict[str, dict[str, dict[str, float]]]:
        parts: dict[str, dict[str, dict[str, float]]] = {}
        for (part, phase), totals in self.audit.totals.items():
            parts.setdefault(part, {})[phase] = asdict(totals)
        return parts


def _stand_in_engine(
    model: Any, optimizer: torch.optim.Optimizer, engine_json: Any, files: Any
) -> StandInDeepSpeed:
    return StandInDeepSpeed(model, optimizer)


def _own_lines(problem: Exception) -> str:
    """Return the lines of this project in a traceback."""
    lines = []
    for frame in traceback.extract_tb(problem.__traceback__):
        if "site-packages" not in frame.filename:
            lines.append(f"  {frame.filename}:{frame.lineno} {frame.name}")
    return "\n".join(lines)
