"""The `router` event of metrics.jsonl: the decisions of all layers' routers in one step.

    load_max_over_mean   [layers]  largest share of an expert; 1 is perfect balance
    entropy              [layers]  mean over tokens of the entropy of the router's softmax, in nats
    aux_loss, z_loss     mean over layers, as cpt/model/experts/router_watch.py defines them,
                         whether trained on or not
    by_language          {language: {load_max_over_mean, distance, overlap: [layers]}}
    overlap              [layers]  share of the assignments that the untouched router would make too
    dropped              assignments that no expert computed, over all layers and ranks; anything
                         but 0 is an error

`distance` is half the sum of absolute differences between the shares of a language and those of all
tokens: 0 if both use the experts alike, 1 if they share none.

Shape letters: L layers, S sources, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from cpt.model.experts.router_watch import RouterSums


def router_event(step: int, sums: RouterSums, languages: Sequence[str]) -> dict[str, Any]:
    """Return the event of one step.

    Args:
        step: The step that was measured.
        sums: Counts and sums of that step over all ranks.
        languages: Language of each source.
    """
    counts_LE = sums.counts_LSE.sum(1)
    tokens_L = counts_LE.sum(1) / sums.top_k
    shares_LE = counts_LE / counts_LE.sum(1, keepdim=True)
    num_experts = shares_LE.shape[1]
    aux_L = num_experts * (shares_LE * sums.probability_LE / tokens_L[:, None]).sum(1)
    event: dict[str, Any] = {
        "event": "router",
        "step": step,
        "load_max_over_mean": _rounded(shares_LE.amax(1) * num_experts),
        "entropy": _rounded(sums.entropy_L / tokens_L),
        "aux_loss": float(aux_L.mean()),
        "z_loss": float((sums.square_L / tokens_L).mean()),
        "dropped": int(counts_LE.sum()) - sums.rows_computed,
        "by_language": {},
    }
    if sums.overlap_LS is not None:
        event["overlap"] = _rounded(sums.overlap_LS.sum(1) / counts_LE.sum(1))
    for language in sorted(set(languages)):
        mine = [index for index, name in enumerate(languages) if name == language]
        of_language_LE = sums.counts_LSE[:, mine].sum(1)
        if of_language_LE.sum() == 0:
            continue
        own_LE = of_language_LE / of_language_LE.sum(1, keepdim=True)
        found = {
            "load_max_over_mean": _rounded(own_LE.amax(1) * num_experts),
            "distance": _rounded((own_LE - shares_LE).abs().sum(1) / 2),
        }
        if sums.overlap_LS is not None:
            found["overlap"] = _rounded(sums.overlap_LS[:, mine].sum(1) / of_language_LE.sum(1))
        event["by_language"][language] = found
    return event


def mean_overlap(event: dict[str, Any]) -> float | None:
    """Return the mean over layers of `overlap` of a router event; None if it was not measured."""
    known = [value for value in event.get("overlap", []) if value is not None]
    return math.fsum(known) / len(known) if known else None


def _rounded(values_L: torch.Tensor) -> list[float | None]:
    return [round(value, 5) if math.isfinite(value) else None for value in values_L.tolist()]
