"""Training in one process with the product's parts, and scores of held-out text.

Model, attention, loss, optimizer, schedule of the learning rate, mixture of the rows, rounding and
scoring are the product's; DeepSpeed's engine, which a single process does not need, is left out.
The working precision is fp32 (`train.dtype: fp32`): bf16 is slower on a CPU.

MXFP4-aware training follows `train.quantize`: after each update from a step on, the weights that
the next forward pass uses are the rounded master weights of the experts' matrices; gradients go to
the masters unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from guard_parts.small_vocabulary import END_OF_TEXT, NUM_MERGES, VOCAB_SIZE
from transformers import GptOssConfig

from cpt.config import TrainSection
from cpt.config.precision_sections import ExponentRule
from cpt.guard.score import ScoredSet, bits_per_byte, score_domain
from cpt.model import attention, gpt_oss
from cpt.model.configuration import PRESETS
from cpt.model.weights.hf_layout import is_expert_matrix
from cpt.model.weights.mxfp4 import rounded
from cpt.model.weights.random_init import RandomWeights
from cpt.model.weights.source import fill_model
from cpt.parallel.topology import Topology
from cpt.training.loader import MicroBatch, make_micro_batch
from cpt.training.narrow_adamw import NarrowAdamW
from cpt.training.optimizer import create_optimizer
from cpt.training.schedule import learning_rate
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.dataset import BuiltData
from data_pipeline.mixture.ledger import Ledger
from data_pipeline.mixture.mixture import Mixture
from data_pipeline.store.files import atomic_write
from mxfp4_parts.scale import Scale

Weights = dict[str, torch.Tensor]
"""All parameters by name, fp32."""
ROWS_PER_PASS = 8
"""Packed rows of one forward pass when text is scored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """A training between two steps."""

    step: int
    """Optimizer steps that are done."""
    weights: Weights
    """The master weights."""
    optimizer: dict[str, Any]
    """State of AdamW; empty at step 0."""

    def save(self, path: Path) -> None:
        """Write the state to a file that appears once it is whole."""
        with atomic_write(path) as file:
            torch.save([self.step, self.weights, self.optimizer], file)

    @classmethod
    def load(cls, path: Path) -> State:
        """Read what `save` wrote."""
        step, weights, optimizer = torch.load(path, weights_only=True)
        return cls(step=step, weights=weights, optimizer=optimizer)


def rounded_experts(weights: Mapping[str, torch.Tensor], rule: ExponentRule) -> Weights:
    """Return a model's weights as an MXFP4 export by a rule has them."""
    result = dict(weights)
    for name, values in weights.items():
        if is_expert_matrix(name, values.shape):
            result[name] = rounded(values, rule)
    return result


def model_config(scale: Scale) -> GptOssConfig:
    """Return the configuration of the small gpt-oss, whose vocabulary is the small one."""
    tokens = {
        "vocab_size": VOCAB_SIZE,
        "pad_token_id": NUM_MERGES,
        "bos_token_id": NUM_MERGES,
        "eos_token_id": END_OF_TEXT,
        "max_position_embeddings": 4096,
    }
    return GptOssConfig(**{**PRESETS["tiny"], **scale.model, **tokens})


class Rows:
    """The rows that every step of a training sees."""

    def __init__(self, data: BuiltData, mix: MixConfig, scale: Scale, topology: Topology) -> None:
        """Read the mix.

        Args:
            data: The build of the mix.
            mix: The shares of the sources, and the seed of their order.
            scale: Sizes.
            topology: The layout of one process.
        """
        self._data = data
        self._mixture = Mixture(data, Ledger.start(mix), mix.seed)
        self._rows = scale.global_batch_size
        self._topology = topology
        self._steps_before = 0

    def after(self, steps: int) -> Rows:
        """Return the rows of a training that follows on one of so many steps."""
        later = copy.copy(self)
        later._steps_before += steps
        return later

    def of_step(self, step: int) -> MicroBatch:
        """Return the rows of a step, counted from 0."""
        batch = self._mixture.global_batch(self._steps_before + step, self._rows)
        sources = [int(source) for source in batch.sources]
        rows = []
        for source, row in zip(sources, batch.rows, strict=True):
            rows.append(self._data.read_row(source, int(row)))
        return make_micro_batch(rows, sources, self._topology)


class Trainer:
    """The model, which takes the weights of one state after the other, and trains and scores."""

    def __init__(self, scale: Scale, topology: Topology) -> None:
        """Allocate the model."""
        self.config = model_config(scale)
        self._topology = topology
        self._model = gpt_oss.skeleton(self.config, torch.float32)
        gpt_oss.patch(self._model, topology)
        gpt_oss.materialize(self._model, topology.device)
        self._kernel = attention.choose(
            "auto",
            device=topology.device,
            dtype=torch.float32,
            head_dim=self.config.head_dim,
        )

    def initial(self, seed: int) -> State:
        """Return a model with random weights."""
        fill_model(self._model, RandomWeights(seed, self.config.initializer_range))
        return State(step=0, weights=self._copied(), optimizer={})

    def train(
        self,
        state: State,
        rows: Rows,
        section: TrainSection,
        stop: int,
        rule: ExponentRule | None = None,
    ) -> State:
        """Train from a state until `stop` steps are done, and return the state then.

        Args:
            state: Where the training begins.
            rows: The rows of every step.
            section: Schedule and optimizer.
            stop: Steps that are done in the end.
            rule: Round the experts from now on, by this rule; None leaves them as they are.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self._take(state.weights)
        optimizer = create_optimizer(self._model, section)
        if isinstance(optimizer, NarrowAdamW):
            assert not state.optimizer, "moments in fewer bytes are not read from a state"
            optimizer.place_whole(dict(self._model.named_parameters()))
        if state.optimizer:
            optimizer.load_state_dict(copy.deepcopy(state.optimizer))
        masters = _Masters(self._model, rule)
        self._model.train()
        for step in range(state.step, stop):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, section)
            batch = rows.of_step(step)
            loss = self._losses(batch).sum() / batch.num_labels
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"the loss of step {step + 1} is {float(loss)}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), section.gradient_clipping)
            masters.restore()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            masters.publish()
        masters.restore()
        return State(step=stop, weights=self._copied(), optimizer=optimizer.state_dict())

    def bits_per_byte(self, weights: Weights, sets: list[ScoredSet]) -> dict[str, float]:
        """Return the bits per byte of every held-out domain under some weights."""
        self._take(weights)
        self._model.eval()
        found = {}
        for domain in sets:
            scored = score_domain(domain, self, self._topology, micro_batch_size=ROWS_PER_PASS)
            found[domain.name] = bits_per_byte(scored.nats, scored.bytes)
        return found

    @torch.no_grad()
    def score(self, batch: MicroBatch) -> torch.Tensor:
        """Return the (B, S) nats of a batch's tokens."""
        return self._losses(batch)

    def _losses(self, batch: MicroBatch) -> torch.Tensor:
        losses: torch.Tensor = self._model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            labels=batch.labels,
            num_labels=batch.num_labels,
            packed_rows=batch.packed_rows,
            kernel=self._kernel,
        )
        return losses

    @torch.no_grad()
    def _take(self, weights: Weights) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(weights[name])

    def _copied(self) -> Weights:
        copied = {}
        for name, parameter in self._model.named_parameters():
            copied[name] = parameter.detach().clone()
        return copied


class _Masters:
    """The master weights of the experts' matrices while the model holds the rounded ones."""

    def __init__(self, model: torch.nn.Module, rule: ExponentRule | None) -> None:
        """Take the masters from the model, and round it for the first time.

        Args:
            model: It holds the master weights.
            rule: How they are rounded; None to do nothing, ever.
        """
        self._rule = rule
        self._masters: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        if rule is not None:
            for name, parameter in model.named_parameters():
                if is_expert_matrix(name, parameter.shape):
                    self._masters.append((parameter, torch.empty_like(parameter)))
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Keep what the model holds as the masters, and give it the rounded weights."""
        for parameter, master in self._masters:
            assert self._rule is not None
            master.copy_(parameter)
            parameter.copy_(rounded(master, self._rule))

    @torch.no_grad()
    def restore(self) -> None:
        """Give the model the masters, to which the optimizer applies its update."""
        for parameter, master in self._masters:
            parameter.copy_(master)


def scored_sets(data: BuiltData) -> Iterator[ScoredSet]:
    """Yield the held-out domains of a build, whole."""
    for domain in data.held_out:
        yield ScoredSet(domain, torch.arange(domain.num_documents).numpy())
