"""One rank of one contender, which trains when told to and reports what each step took."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import measuring  # noqa: E402

from step_parts.cases import (  # noqa: E402
    EXPERT_RANK,
    GROUPED,
    LR,
    OURS,
    RANK,
    WARM_UP_STEPS,
    Baton,
    Case,
    model_config,
    row,
)


class Clock:
    """What one step took: time on the case's clock, or the peak of memory."""

    def __init__(self, case: Case) -> None:
        self._read = time.process_time if case.clock == "cpu" else time.perf_counter
        self._measures_memory = case.measures_memory

    def start(self) -> None:
        """Begin to measure, just before the step."""
        if self._measures_memory:
            measuring.reset_peak()
        self._started = self._read()

    def stop(self) -> dict[str, Any]:
        """Return what the step took, just after it."""
        if self._measures_memory:
            return {"peak_bytes": measuring.peak_resident_bytes()}
        return {"seconds": self._read() - self._started}


def run_ours(case: Case, baton: Baton, rank: int) -> None:
    """Train with this project."""
    from cpt.training.loader import make_micro_batch
    from step_parts.ours import build

    engine, topology = build(case)
    clock = Clock(case)
    for step in range(WARM_UP_STEPS + case.steps):
        baton.wait(step)
        clock.start()
        rows = [row(case, step * case.ranks + other) for other in range(case.ranks)]
        predicted = sum(int((r.labels >= 0).sum()) for r in rows)
        batch = make_micro_batch([rows[rank]], [0], topology)
        result = engine.step([batch], [predicted], step=step + 1)
        baton.done(step, {**clock.stop(), "loss": result.loss})


def run_trainer(case: Case, baton: Baton, rank: int, folder: Path) -> None:
    """Train with the Hugging Face Trainer, set up as its documentation says.

    It runs DeepSpeed ZeRO-3, without DeepSpeed PEFT's adapters, and eager attention, for which
    restarting positions go unseen: packed documents are not kept apart.
    """
    from transformers import GptOssForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
            packed = row(case, number)
            # the model shifts labels itself
            labels = np.concatenate([[-100], packed.labels[:-1]])
            return {
                "input_ids": torch.from_numpy(packed.input_ids),
                "labels": torch.from_numpy(labels),
                "position_ids": torch.from_numpy(packed.position_ids),
            }

    class TakeTurns(TrainerCallback):
        clock = Clock(case)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            baton.wait(state.global_step)
            self.clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            baton.done(state.global_step - 1, self.clock.stop())

    engine: dict[str, Any] = {}
    if not case.lora:
        engine["deepspeed"] = deepspeed_settings()
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=1,
        max_steps=WARM_UP_STEPS + case.steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **engine,
    )
    config = model_config(case)
    config._attn_implementation = "eager"
    config._experts_implementation = "grouped_mm" if case.contender == GROUPED else "eager"
    torch.manual_seed(0)
    model: Any = GptOssForCausalLM._from_config(config, dtype=torch.bfloat16)
    if case.lora:
        model = with_peft(model)
    Trainer(model=model, args=settings, train_dataset=Rows(), callbacks=[TakeTurns()]).train()


def deepspeed_settings() -> dict[str, Any]:
    """Return ZeRO-3 as the documentation of the Trainer has it."""
    zero = {"stage": 3, "overlap_comm": False, "stage3_gather_16bit_weights_on_model_save": False}
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }


def with_peft(model: Any) -> Any:
    """Return a model with PEFT's adapters on attention and on every expert."""
    from peft import LoraConfig, get_peft_model

    experts = ("experts.gate_up_proj", "experts.down_proj")
    settings = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        lora_dropout=0.0,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=[f"mlp.{name}" for name in experts],
        rank_pattern=dict.fromkeys(experts, EXPERT_RANK),
        alpha_pattern=dict.fromkeys(experts, EXPERT_RANK),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings)


def main() -> None:
    """Train as the arguments say: the case as JSON, and the folder of the baton."""
    case = Case(**json.loads(sys.argv[1]))
    folder = Path(sys.argv[2])
    torch.set_num_threads(case.threads)
    rank = int(os.environ["RANK"])
    baton = Baton(folder, rank)
    if case.contender == OURS:
        run_ours(case, baton, rank)
    else:
        import deepspeed

        # it would compile for most of a minute, for nothing
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        run_trainer(case, baton, rank, folder)


if __name__ == "__main__":
    main()
