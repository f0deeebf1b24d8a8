"""Text from a plain transformers model, and tokens as people read them.

`generate` gives the tokens of `AutoModelForCausalLM.generate` with the same settings, for one
prompt in one process. cpt/training/generate.py serves many prompts on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cpt.training.sampling import Sampling
from data_pipeline.text.harmony import STOP_IDS
from data_pipeline.text.harmony_reply import parse_reply
from data_pipeline.text.tokenizer import END_OF_TEXT, encoding


@torch.no_grad()
def generate(model: Any, prompt: Sequence[int], sampling: Sampling) -> list[int]:
    """Return the new tokens that continue a prompt, the one that ended them included."""
    torch.manual_seed(sampling.seed)
    ids_1T = torch.tensor([list(prompt)], device=model.device)
    settings: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        settings = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    out_1T = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=list(STOP_IDS),
        pad_token_id=END_OF_TEXT,
        **settings,
    )
    new_tokens: list[int] = out_1T[0, ids_1T.shape[1] :].tolist()
    return new_tokens


def decode_tokens(tokens: Sequence[int]) -> str:
    """Return the text of tokens; control tokens appear by name."""
    return encoding().decode(list(tokens))


def decode_channels(tokens: Sequence[int]) -> str:
    """Return a reply for people: each of its messages under the name of its channel."""
    blocks = []
    for message in parse_reply(tokens):
        name = message.channel or "no channel"
        if message.recipient:
            name += f" to {message.recipient}"
        blocks.append(f"[{name}]\n{message.text}")
    if not tokens or tokens[-1] not in STOP_IDS:
        blocks.append("[cut off by --max_new_tokens]")
    return "\n".join(blocks)
