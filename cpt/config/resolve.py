"""Run YAML, DeepSpeed JSON, model and world size -> one `RunConfig` with no `auto` left."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

from cpt.config.engine_json import OFFLOADS, OWN_KEYS, REFUSED_KEYS
from cpt.config.sections import LaunchInfo, RunConfig, RunYaml
from cpt.errors import ConfigError
from data_pipeline.config.strict_yaml import Located


def resolve(run: RunYaml, json_file: Located, model_config: Any, launch: LaunchInfo) -> RunConfig:
    """Bring files, model and world size together.

    Args:
        run: The run YAML.
        json_file: The DeepSpeed JSON.
        model_config: The model's GptOssConfig.
        launch: World size and ranks per node.

    Raises:
        ConfigError: everything that does not fit together, with the nearest valid values.
    """
    return _Resolver(run, json_file, model_config, launch).resolve()


class _Resolver:
    def __init__(self, run: RunYaml, file: Located, model_config: Any, launch: LaunchInfo) -> None:
        self.run, self.file, self.model, self.launch = run, file, model_config, launch
        self.json: dict[str, Any] = file.value
        self.problems: list[str] = []

    def resolve(self) -> RunConfig:
        sp_size, ep_size = self._sp_size(), self._ep_size()
        if self.problems:  # what follows from a refused size would only mislead
            raise ConfigError(self.problems)
        micro_batch_size, accumulation = self._batch_sizes(sp_size)
        use_halo = self._use_halo(sp_size)
        self._check_agreement()
        engine_json = self._engine_json(micro_batch_size, accumulation)
        if self.problems:
            raise ConfigError(self.problems)
        sections = {
            section.name: getattr(self.run, section.name)
            for section in dataclasses.fields(self.run)
        }
        return RunConfig(
            **sections,
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
        """Refuse what does not divide; `auto`: the largest size within a node that divides all it
        must.
        """
        heads, kv_heads = self.model.num_attention_heads, self.model.num_key_value_heads
        wanted, seq_len = self.json.get("sequence_parallel_size", 1), self.run.train.seq_len
        rules = {
            f"the world size {self.launch.world_size}": lambda n: self.launch.world_size % n == 0,
            f"the {heads} query heads": lambda n: heads % n == 0,
            f"(nor is a multiple of) the {kv_heads} key/value heads": lambda n: (
                kv_heads % n == 0 or n % kv_heads == 0
            ),
        }
        if wanted == "auto":
            rules["seq_len"] = lambda n: seq_len % n == 0
        elif seq_len % wanted:
            below = seq_len - seq_len % wanted
            options = f"{below} or {below + wanted}" if below else str(wanted)
            self.problems.append(
                f"train.seq_len={seq_len} cannot be cut into {wanted} equal parts (sequence_parallel_size). "
                f"Nearest that can: {options}."
            )
        return self._choose("sequence_parallel_size", wanted, rules)

    def _ep_size(self) -> int:
        block = self.json.get("expert_parallel", {})
        if not block.get("enabled", False):
            return 1
        experts = self.model.num_local_experts
        rules = {
            f"the world size {self.launch.world_size}": lambda n: self.launch.world_size % n == 0,
            f"the {experts} experts": lambda n: experts % n == 0,
        }
        return self._choose(
            "expert_parallel", block.get("autoep_size", "auto"), rules, name="autoep_size"
        )

    def _choose(self, key: str, wanted: Any, rules: dict[str, Any], name: str | None = None) -> int:
        """A size that obeys all rules; `auto` also divides the ranks of this node."""
        limit = max(
            self.launch.world_size, self.model.num_attention_heads, self.model.num_local_experts
        )
        valid = [n for n in range(1, limit + 1) if all(rule(n) for rule in rules.values())]
        if wanted == "auto":
            return max(n for n in valid if self.launch.local_world_size % n == 0)
        broken = [text for text, rule in rules.items() if not rule(wanted)]
        if broken:
            options = ", ".join(map(str, sorted(sorted(valid, key=lambda n: abs(n - wanted))[:3])))
            label = f".{name}" if name else ""
            joined = " and ".join(broken)
            self._problem(
                key + label,
                f"= {wanted} does not divide {joined}. Nearest sizes that fit: {options}.",
            )
            return 1
        return int(wanted)

    def _use_halo(self, sp_size: int) -> bool:
        wanted, local_tokens = self.run.model.window_exchange, self.run.train.seq_len // sp_size
        reach = (self.model.sliding_window or 1) - 1
        if wanted == "halo" and sp_size > 1 and local_tokens < reach:
            self.problems.append(
                f"model.window_exchange=halo needs {reach} tokens on each rank, but train.seq_len "
                f"{self.run.train.seq_len} / sequence_parallel_size {sp_size} is {local_tokens}. Use auto or ulysses."
            )
        return sp_size > 1 and wanted != "ulysses" and local_tokens >= reach

    def _batch_sizes(self, sp_size: int) -> tuple[int, int]:
        """(micro batch size, accumulation steps); nothing is ever rounded."""
        train, dp_size = self.run.train, self.launch.world_size // sp_size
        given = self.json.get("train_micro_batch_size_per_gpu", "auto")
        if given != "auto" and train.micro_batch_size not in ("auto", given):
            self._problem(
                "train_micro_batch_size_per_gpu",
                f"is {given}, but train.micro_batch_size in the run YAML is {train.micro_batch_size}. Keep one.",
            )
        micro = train.micro_batch_size if train.micro_batch_size != "auto" else given
        micro = 1 if micro == "auto" else int(micro)
        rows, per_pass = train.global_batch_size, micro * dp_size
        if rows % per_pass:
            below, above = rows - rows % per_pass, rows - rows % per_pass + per_pass
            nearest_valid = f"{below} or {above}" if below else str(above)
            self.problems.append(
                f"train.global_batch_size={rows} rows cannot be divided among {dp_size} data-parallel ranks x "
                f"micro_batch_size {micro} (world {self.launch.world_size} / sequence_parallel_size {sp_size}). "
                f"Nearest that can: {nearest_valid}."
            )
            return micro, 1
        accumulation = rows // per_pass
        for key, value in (
            ("gradient_accumulation_steps", accumulation),
            ("train_batch_size", rows),
        ):
            if self.json.get(key, "auto") not in ("auto", value):
                self._problem(
                    key,
                    f"is {self.json[key]}, but global_batch_size {rows} / (micro_batch_size {micro} x {dp_size} "
                    f"data-parallel ranks) gives {value}. Write 'auto'.",
                )
        return micro, accumulation

    def _check_agreement(self) -> None:
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
                f"is {clipping}, but train.gradient_clipping is {train.gradient_clipping}.",
            )
        self._check_optimizer()
        if train.seq_len > self.model.max_position_embeddings:
            limit = self.model.max_position_embeddings
            self.problems.append(
                f"train.seq_len={train.seq_len} is more than the model's {limit} positions."
            )

    def _check_optimizer(self) -> None:
        """An `optimizer` block is welcome as long as it says what the run YAML says."""
        optimizer, train = self.json.get("optimizer"), self.run.train
        if optimizer is None:
            return
        if not isinstance(optimizer, dict) or optimizer.get("type") not in ("AdamW", "Adam"):
            self._problem("optimizer", "must have type AdamW.")
            return
        same = {"lr": train.lr, "eps": train.eps, "weight_decay": train.weight_decay}
        same_lists = {"betas": [train.beta1, train.beta2]}
        for name, value in optimizer.get("params", {}).items():
            expected = {**same, **same_lists, "torch_adam": value, "adam_w_mode": True}.get(name)
            if expected is None:
                self._problem(
                    "optimizer",
                    f"has params.{name}, which is not a known key; train.* has the settings.",
                )
            elif value != "auto" and value != expected:
                self._problem(
                    "optimizer",
                    f"has params.{name}={value}, but train.{name} is {expected}. Write 'auto'.",
                )

    def _engine_json(self, micro_batch_size: int, accumulation: int) -> dict[str, Any]:
        train = self.run.train
        engine = {
            key: copy.deepcopy(value)
            for key, value in self.json.items()
            if key not in (*OWN_KEYS, "optimizer")
        }
        engine = {key: value for key, value in engine.items() if key not in REFUSED_KEYS}
        engine["train_micro_batch_size_per_gpu"] = micro_batch_size
        engine["gradient_accumulation_steps"] = accumulation
        # DeepSpeed sees every rank as a data-parallel one, also those that share a row
        engine["train_batch_size"] = micro_batch_size * accumulation * self.launch.world_size
        engine["gradient_clipping"] = train.gradient_clipping
        engine["bf16"] = {**engine.get("bf16", {}), "enabled": train.dtype == "bf16"}
        engine["zero_allow_untested_optimizer"] = True
        engine["zero_force_ds_cpu_optimizer"] = (
            False  # the optimizer is this project's, wherever its state lies
        )
        engine.setdefault("steps_per_print", 10**12)
        zero = engine["zero_optimization"]
        self._fill_auto_sizes(zero)
        for name in OFFLOADS:
            if zero.get(name, {}).get("device") == "none":
                del zero[name]
        if train.dtype == "bf16" and zero["stage"] == 1 and "data_types" in engine:
            self._problem(
                "data_types",
                "with ZeRO stage 1 and bf16 selects an optimizer that cannot be saved; use 2.",
            )
        if train.dtype == "bf16" and zero["stage"] != 1:
            engine["data_types"] = {"grad_accum_dtype": "fp32", **engine.get("data_types", {})}
        if not math.isfinite(train.gradient_clipping):
            self._problem("gradient_clipping", "must be finite.")
        return engine

    def _fill_auto_sizes(self, zero: dict[str, Any]) -> None:
        """The values that transformers' own integration gives these keys."""
        hidden = self.model.hidden_size
        sizes = {
            "reduce_bucket_size": hidden * hidden,
            "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
            "stage3_param_persistence_threshold": 10 * hidden,
        }
        for key, value in zero.items():
            if value == "auto":
                if key in sizes:
                    zero[key] = sizes[key]
                else:
                    self._problem(
                        f"zero_optimization.{key}",
                        f"is 'auto', which only {', '.join(sizes)} may be.",
                    )
