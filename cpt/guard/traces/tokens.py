"""Which tokens of a reply are control tokens: those that carry the Harmony format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.text.harmony import CHANNEL, START
from data_pipeline.text.tokenizer import NUM_TEXT_TOKENS


def control_mask(reply: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Return (tokens,) whether each token of a reply is a control token.

    The names of role and channel, which follow <|start|> and <|channel|>, count as such: whether
    the model goes on in `analysis` or in `final` is format.
    """
    mask = np.zeros(len(reply), dtype=np.bool_)
    is_name = False
    for index, token in enumerate(reply):
        if token >= NUM_TEXT_TOKENS:
            is_name = token in (START, CHANNEL)
            mask[index] = True
        else:
            mask[index] = is_name
    return mask
