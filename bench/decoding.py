"""Compare decoding with this project's key/value cache, a forward per token, and transformers.

    python bench/decoding.py [--prompts 8] [--prompt_tokens 128] [--new_tokens 256] [--rounds 1]
        [--json FILE]

The model is that of bench/step.py (hidden 512, 8 heads, experts of 384, top 4), with random weights
in fp32 (bf16 on a GPU), in one process and without an engine.  All contenders continue the same
prompts greedily by the same number of tokens, one after the other in each round:

    this project          cpt.training.generate, all prompts at once
    a forward per token   whole rows without a cache, all prompts at once, the model patched alike
    transformers, batch   generate of plain transformers, all prompts at once
    transformers, single  the same, one prompt after the other

The replies are compared, too.  Times are medians, and ratios medians of the rounds' ratios.  On a
machine that others use at the same time, `--clock cpu --threads 1` counts the CPU seconds of the
process instead of wall time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import measuring  # noqa: E402
from step_parts.cases import OURS, Case, model_config  # noqa: E402

from cpt.model.attention import PackedRows  # noqa: E402
from cpt.model.weights.random_init import RandomWeights  # noqa: E402
from cpt.offline.model import OfflineModel  # noqa: E402
from cpt.offline.ranks import single_process  # noqa: E402
from cpt.training.generate import generate  # noqa: E402
from cpt.training.sampling import Sampling  # noqa: E402

Replies = list[list[int]]

FORWARDS = "a forward per token"
BATCH = "transformers, batch"
SINGLE = "transformers, single"
NAMES = (OURS, FORWARDS, BATCH, SINGLE)
RANDOM_STD = 0.05
"""Standard deviation of the weights; with 0.02 a model of two layers repeats one token."""


class Contenders:
    """One model in all its forms, and the prompts."""

    def __init__(self, options: argparse.Namespace, ours: OfflineModel) -> None:
        self._ours = ours
        self._new_tokens = options.new_tokens
        self._device = ours.topology.device
        self._plain: Any = GptOssForCausalLM(ours.model_config).to(self._device, ours.dtype).eval()
        self._plain.load_state_dict(ours._model.state_dict())
        generator = torch.Generator().manual_seed(1)
        shape = (options.prompts, options.prompt_tokens)
        self._prompts_BT = torch.randint(0, 8000, shape, generator=generator)
        self.replies: dict[str, Replies] = {}
        """The last replies of each contender."""

    def run(self, name: str) -> None:
        """Let a contender continue all prompts."""
        calls = {
            OURS: self._with_cache,
            FORWARDS: self._with_forwards,
            BATCH: lambda: self._with_transformers(self._prompts_BT),
            SINGLE: self._one_by_one,
        }
        self.replies[name] = calls[name]()

    def _with_cache(self) -> Replies:
        sampling = Sampling(max_new_tokens=self._new_tokens)
        return generate(self._ours, self._prompts_BT.tolist(), sampling, stop_ids=[])

    @torch.no_grad()
    def _with_forwards(self) -> Replies:
        """Run the whole rows for each token, with room for all tokens from the start."""
        rows, prompt_tokens = self._prompts_BT.shape
        length = prompt_tokens + self._new_tokens
        tokens_BT = torch.zeros(rows, length, dtype=torch.int64, device=self._device)
        tokens_BT[:, :prompt_tokens] = self._prompts_BT
        packed = PackedRows.from_bounds([[0, length]] * rows, length)
        positions_BT = torch.arange(length, device=self._device).expand(rows, -1)
        first_of_row = torch.arange(rows, device=self._device) * length
        for end in range(prompt_tokens, length):
            logits_BV = self._ours._model(
                input_ids=tokens_BT,
                position_ids=positions_BT,
                logits_at=first_of_row + end - 1,
                packed_rows=packed,
                kernel=self._ours._kernel,
            )
            tokens_BT[:, end] = logits_BV.float().argmax(-1)
        replies: Replies = tokens_BT[:, prompt_tokens:].tolist()
        return replies

    def _with_transformers(self, prompts_BT: torch.Tensor) -> Replies:
        prompts_BT = prompts_BT.to(self._device)
        out_BT = self._plain.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=self._new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        replies: Replies = out_BT[:, prompts_BT.shape[1] :].tolist()
        return replies

    def _one_by_one(self) -> Replies:
        replies = []
        for prompt_T in self._prompts_BT:
            replies += self._with_transformers(prompt_T.unsqueeze(0))
        return replies


def main(arguments: list[str] | None = None) -> None:
    """Print a line per contender, and write the figures if asked."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    case = Case(
        contender=OURS,
        tokens=0,
        ranks=1,
        steps=0,
        threads=options.threads,
        experts=options.experts,
        layers=options.layers,
        clock=options.clock,
    )
    with single_process() as topology:
        ours = OfflineModel(model_config(case), topology)
        ours.load(RandomWeights(0, RANDOM_STD))
        result = measure(Contenders(options, ours), topology.device, options)
        device = topology.device
    for name in NAMES:
        print(line_of(name, result, options), flush=True)
    measuring.publish({"machine": machine(device, options), **result}, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds of the process"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def measure(
    contenders: Contenders, device: torch.device, options: argparse.Namespace
) -> dict[str, Any]:
    """Return median seconds and ratios, and how many replies equal those of this project."""
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    contenders.run(OURS)  # nothing is measured while libraries start
    for _ in range(options.rounds):
        for name in NAMES:
            seconds = measuring.seconds(
                functools.partial(contenders.run, name), device, options.clock
            )
            times[name].append(seconds)
    equal = {}
    for name in NAMES:
        pairs = zip(contenders.replies[name], contenders.replies[OURS], strict=True)
        equal[name] = sum(reply == own for reply, own in pairs)
    return {
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratio to ours": measuring.median_ratios(times, OURS),
        "equal replies": equal,
    }


def line_of(name: str, result: dict[str, Any], options: argparse.Namespace) -> str:
    """Return a row of the table."""
    seconds = result["seconds"][name]
    tokens_per_second = options.prompts * options.new_tokens / seconds
    return (
        f"{name:<21} {seconds:8.2f} s, {tokens_per_second:8.1f} tokens/s, "
        f"{result['ratio to ours'][name]:6.2f}x the time, "
        f"{result['equal replies'][name]} of {options.prompts} replies equal"
    )


def machine(device: torch.device, options: argparse.Namespace) -> dict[str, Any]:
    """Return where the figures come from."""
    return {
        **measuring.origin(device, options),
        "model": f"{options.layers} layers, {options.experts} experts, hidden 512, top 4",
        "prompts": f"{options.prompts} of {options.prompt_tokens} tokens",
        "new tokens": options.new_tokens,
    }


if __name__ == "__main__":
    main()
