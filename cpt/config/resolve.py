"""Bring run YAML, DeepSpeed JSON, model and world size together in one `RunConfig`.

No `auto` is left in it, and nothing is rounded: a number that does not fit is refused together with
the nearest ones that do.
"""

from __future__ import annotations

import copy
import math
from typing import Any

from cpt.config.block_parts import block_problems
from cpt.config.engine_json import OWN_KEYS, REFUSED_KEYS
from cpt.config.exchange_problems import halo_problem, head_groups_problem, overlap_problem
from cpt.config.layout import SizeChooser, Wanted, divides, expert_rules, sequence_rules
from cpt.config.moment_blocks import moment_block_problems
from cpt.config.offload_blocks import OFFLOADS
from cpt.config.sections import LaunchInfo, RunConfig, RunYaml
from cpt.config.window import window_tokens
from cpt.errors import ConfigError
from data_pipeline.config.strict_yaml import Located


def resolve(
    run: RunYaml,
    json_file: Located,
    model_config: Any,
    launch: LaunchInfo,
    measured_seq_len: int | None = None,
) -> RunConfig:
    """Bring files, model and world size together.

    Args:
        run: The run YAML, of one stage (`cpt.config.stages`).
        json_file: The DeepSpeed JSON.
        model_config: The model's GptOssConfig.
        launch: World size and ranks per node.
        measured_seq_len: Tokens of the rows in which held-out text is measured; None if they are
            those of training.

    Raises:
        ConfigError: everything that does not fit together, with the nearest valid values.
    """
    return _Resolver(run, json_file, model_config, launch, measured_seq_len).resolve()


def nearest_multiples(value: int, step: int) -> str:
    """Name the multiples of `step` next to a value, for a message; 0 is not offered."""
    below = value - value % step
    if below == 0:
        return str(step)
    return f"{below} or {below + step}"


class _Resolver:
    """Collects the problems of one configuration while its values are resolved."""

    def __init__(
        self,
        run: RunYaml,
        file: Located,
        model: Any,
        launch: LaunchInfo,
        measured_seq_len: int | None,
    ) -> None:
        self.run = run
        self.measured_seq_len = measured_seq_len or run.train.seq_len
        self.file = file
        self.model = model
        self.launch = launch
        self.json: dict[str, Any] = file.value
        self.problems: list[str] = []

    def resolve(self) -> RunConfig:
        sp_size = self._sp_size()
        ep_size = self._ep_size()
        if self.problems:  # what follows from a refused size would only mislead
            raise ConfigError(self.problems)
        micro_batch_size, accumulation = self._batch_sizes(sp_size)
        use_halo = self._use_halo(sp_size)
        self._note(overlap_problem(self.run.model, self.model, ep_size))
        self._note(head_groups_problem(self.run.model, self.model, sp_size))
        self._check_agreement()
        self._check_blocks()
        engine_json = self._engine_json(micro_batch_size, accumulation)
        if self.problems:
            raise ConfigError(self.problems)
        return RunConfig(
            model=self.run.model,
            data=self.run.data,
            train=self.run.train,
            adapter=self.run.adapter,
            guard=self.run.guard,
            checkpoint=self.run.checkpoint,
            telemetry=self.run.telemetry,
            watchdog=self.run.watchdog,
            network=self.run.network,
            world_size=self.launch.world_size,
            sp_size=sp_size,
            ep_size=ep_size,
            use_halo=use_halo,
            micro_batch_size=micro_batch_size,
            gradient_accumulation_steps=accumulation,
            engine_json=engine_json,
        )

    def _problem(self, key: str, message: str) -> None:
        self.problems.append(f"{self.file.where((key,))} {message}")

    def _sp_size(self) -> int:
        wanted: Wanted = self.json.get("sequence_parallel_size", 1)
        seq_len = self.run.train.seq_len
        rules = sequence_rules(self.model, self.launch)
        if wanted == "auto":
            rules.append(divides(seq_len, "seq_len"))
            if self.measured_seq_len != seq_len:
                rules.append(divides(self.measured_seq_len, "seq_len of the first stage"))
        elif seq_len % wanted:
            self.problems.append(
                f"train.seq_len={seq_len} cannot be cut into {wanted} equal parts "
                "(sequence_parallel_size). "
                f"Nearest that can: {nearest_multiples(seq_len, wanted)}."
            )
        elif self.measured_seq_len % wanted:
            measured = self.measured_seq_len
            self.problems.append(
                f"sequence_parallel_size {wanted} cannot cut the rows of {measured} tokens in "
                "which held-out text is measured, those of the first stage, into equal parts. "
                f"Nearest that can be cut: {nearest_multiples(measured, wanted)}."
            )
        chooser = SizeChooser(rules, self.model, self.launch)
        return self._choose("sequence_parallel_size", wanted, chooser)

    def _ep_size(self) -> int:
        block = self.json.get("expert_parallel", {})
        if not block.get("enabled", False):
            return 1
        chooser = SizeChooser(expert_rules(self.model, self.launch), self.model, self.launch)
        return self._choose(
            "expert_parallel.autoep_size", block.get("autoep_size", "auto"), chooser
        )

    def _choose(self, key: str, wanted: Wanted, chooser: SizeChooser) -> int:
        """Return the size to use; 1, with a problem noted, if the size asked for does not fit."""
        if wanted == "auto":
            return chooser.largest()
        refusal = chooser.refusal(wanted)
        if refusal:
            self._problem(key, refusal)
            return 1
        return wanted

    def _use_halo(self, sp_size: int) -> bool:
        wanted = self.run.model.window_exchange
        shortest = min(self.run.train.seq_len, self.measured_seq_len)
        self._note(halo_problem(self.run.model, self.model, sp_size, shortest))
        reach = window_tokens(self.model) - 1
        return sp_size > 1 and wanted != "ulysses" and 0 < reach <= shortest // sp_size

    def _note(self, problem: str | None) -> None:
        if problem is not None:
            self.problems.append(problem)

    def _check_blocks(self) -> None:
        self.problems += block_problems(
            self.run.train.quantize,
            self.model,
            zero_stage=self.json["zero_optimization"]["stage"],
            world_size=self.launch.world_size,
        )
        self.problems += moment_block_problems(
            self.run.train.optimizer_state, self.model, world_size=self.launch.world_size
        )

    def _batch_sizes(self, sp_size: int) -> tuple[int, int]:
        """Return (micro batch size, accumulation steps)."""
        micro = self._micro_batch_size()
        dp_size = self.launch.world_size // sp_size
        rows = self.run.train.global_batch_size
        rows_per_pass = micro * dp_size
        if rows % rows_per_pass:
            self.problems.append(
                f"train.global_batch_size={rows} rows cannot be divided among {dp_size} "
                f"data-parallel ranks x micro_batch_size {micro} (world {self.launch.world_size} / "
                f"sequence_parallel_size {sp_size}). "
                f"Nearest that can: {nearest_multiples(rows, rows_per_pass)}."
            )
            return micro, 1
        accumulation = rows // rows_per_pass
        derived = {"gradient_accumulation_steps": accumulation, "train_batch_size": rows}
        for key, value in derived.items():
            given = self.json.get(key, "auto")
            if given not in ("auto", value):
                self._problem(
                    key,
                    f"is {given}, but global_batch_size {rows} / (micro_batch_size {micro} x "
                    f"{dp_size} data-parallel ranks) gives {value}. Write 'auto'.",
                )
        return micro, accumulation

    def _micro_batch_size(self) -> int:
        """Return the size that either file gives; 1 if both leave it open."""
        in_yaml = self.run.train.micro_batch_size
        in_json = self.json.get("train_micro_batch_size_per_gpu", "auto")
        if in_json != "auto" and in_yaml not in ("auto", in_json):
            self._problem(
                "train_micro_batch_size_per_gpu",
                f"is {in_json}, but train.micro_batch_size in the run YAML is {in_yaml}. Keep one.",
            )
        if in_yaml != "auto":
            return in_yaml
        if in_json != "auto":
            return int(in_json)
        return 1

    def _check_agreement(self) -> None:
        """Note values that the two files, or the model, contradict."""
        train = self.run.train
        bf16 = self.json.get("bf16", {})
        enabled = bf16.get("enabled", "auto") if isinstance(bf16, dict) else None
        if enabled not in ("auto", train.dtype == "bf16"):
            self._problem(
                "bf16", f"has enabled={enabled!r}, but train.dtype is {train.dtype}. Write 'auto'."
            )
        clipping = self.json.get("gradient_clipping", "auto")
        if clipping not in ("auto", train.gradient_clipping):
            self._problem(
                "gradient_clipping",
                f"is {clipping}, but train.gradient_clipping is {train.gradient_clipping}. "
                "Write 'auto'.",
            )
        if not math.isfinite(train.gradient_clipping):
            self._problem("gradient_clipping", "must be finite.")
        self._check_optimizer()
        positions = self.model.max_position_embeddings
        if train.seq_len > positions:
            self.problems.append(
                f"train.seq_len={train.seq_len} is more than the model's {positions} positions. "
                "Lower it, and build the mix again with that seq_len."
            )

    def _check_optimizer(self) -> None:
        """Accept an `optimizer` block that repeats what the run YAML says."""
        optimizer = self.json.get("optimizer")
        if optimizer is None:
            return
        if self.run.train.optimizer == "muon":
            self._problem(
                "optimizer",
                "is given, but train.optimizer is muon, whose settings are in train.*. Remove it.",
            )
            return
        if not isinstance(optimizer, dict) or optimizer.get("type") not in ("AdamW", "Adam"):
            self._problem("optimizer", "must have type AdamW.")
            return
        train = self.run.train
        expected = {
            "lr": train.lr,
            "eps": train.eps,
            "weight_decay": train.weight_decay,
            "betas": [train.beta1, train.beta2],
            "adam_w_mode": True,
        }
        for name, value in optimizer.get("params", {}).items():
            if name == "torch_adam":
                continue
            if name not in expected:
                self._problem(
                    "optimizer",
                    f"has params.{name}, which is not a known key; train.* has the settings.",
                )
            elif value not in ("auto", expected[name]):
                self._problem(
                    "optimizer",
                    f"has params.{name}={value}, but train.{name} is {expected[name]}. "
                    "Write 'auto'.",
                )

    def _engine_json(self, micro_batch_size: int, accumulation: int) -> dict[str, Any]:
        """Return the user's JSON as DeepSpeed gets it."""
        train = self.run.train
        not_for_deepspeed = {*OWN_KEYS, *REFUSED_KEYS, "optimizer"}
        engine: dict[str, Any] = {}
        for key, value in self.json.items():
            if key not in not_for_deepspeed:
                engine[key] = copy.deepcopy(value)
        engine["train_micro_batch_size_per_gpu"] = micro_batch_size
        engine["gradient_accumulation_steps"] = accumulation
        # DeepSpeed sees every rank as a data-parallel one, also those that share a row
        engine["train_batch_size"] = micro_batch_size * accumulation * self.launch.world_size
        engine["gradient_clipping"] = train.gradient_clipping
        engine["bf16"] = {**engine.get("bf16", {}), "enabled": train.dtype == "bf16"}
        engine["zero_allow_untested_optimizer"] = True
        # the optimizer is this project's own, wherever its state lies
        engine["zero_force_ds_cpu_optimizer"] = False
        engine.setdefault("steps_per_print", 10**12)
        zero = engine["zero_optimization"]
        self._fill_auto_sizes(zero)
        for name in OFFLOADS:
            if zero.get(name, {}).get("device") == "none":
                del zero[name]
        if train.dtype == "bf16":
            self._set_accumulation_dtype(engine)
        return engine

    def _set_accumulation_dtype(self, engine: dict[str, Any]) -> None:
        """Let gradients add up in fp32 where the ZeRO stage can save such a run."""
        if engine["zero_optimization"]["stage"] != 1:
            engine["data_types"] = {"grad_accum_dtype": "fp32", **engine.get("data_types", {})}
        elif "data_types" in engine:
            self._problem(
                "data_types",
                "with ZeRO stage 1 and bf16 selects an optimizer that cannot be saved; "
                "use stage 2.",
            )

    def _fill_auto_sizes(self, zero: dict[str, Any]) -> None:
        """Resolve `auto` as the DeepSpeed integration of transformers does."""
        hidden = self.model.hidden_size
        sizes = {
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
        }
        for key, value in zero.items():
            if value != "auto":
                continue
            if key in sizes:
                zero[key] = sizes[key]
            else:
                self._problem(
                    f"zero_optimization.{key}",
                    f"is 'auto', which only {', '.join(sizes)} may be.",
                )
