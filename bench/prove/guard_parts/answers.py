"""Answers that a model gives to task items, as JSON: the accuracy of the behavior proof.

    python bench/prove/guard_parts/answers.py --model DIR --items FILE --out FILE

It runs in a process of its own, with the small vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "bench" / "prove")]

from guard_parts.small_vocabulary import shrink  # noqa: E402

shrink()

from cpt.guard.generation.measures import measure_reply  # noqa: E402
from cpt.model.configuration import load_config  # noqa: E402
from cpt.model.parameters import parameter_shapes  # noqa: E402
from cpt.model.weights.directory import DirectoryWeights  # noqa: E402
from cpt.offline.model import OfflineModel  # noqa: E402
from cpt.offline.rank_options import RankOptions  # noqa: E402
from cpt.offline.ranks import offline_ranks  # noqa: E402
from cpt.training.generate import generate  # noqa: E402
from cpt.training.sampling import Sampling  # noqa: E402
from data_pipeline.store.files import atomic_write  # noqa: E402
from data_pipeline.text.harmony import DEFAULT_DATE, encode_prompt  # noqa: E402


def main() -> None:
    """Ask the model every item, and write which it answers rightly and in good form."""
    parser = argparse.ArgumentParser(description="Answers of a model to task items.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max_new_tokens", type=int, required=True)
    options = parser.parse_args()
    items = [json.loads(line) for line in options.items.read_text().splitlines()]
    prompts = []
    for item in items:
        prompts.append(
            encode_prompt(item["prompt"], developer=None, effort="medium", date=DEFAULT_DATE)
        )
    config = load_config(options.model, None)
    with offline_ranks(config, options.out.with_suffix(".part"), RankOptions()) as ranks:
        model = OfflineModel(config, ranks.topology)
        model.load(DirectoryWeights(options.model, parameter_shapes(config)))
        replies = generate(model, prompts, Sampling(max_new_tokens=options.max_new_tokens))
    answered = []
    for item, reply in zip(items, replies, strict=True):
        measures = measure_reply(reply, item["language"], [item["answer"]])
        answered.append(
            {
                "family": item["family"],
                "language": item["language"],
                "right": bool(measures.right),
                "good_form": measures.good_form,
            }
        )
    with atomic_write(options.out) as file:
        file.write(json.dumps(answered).encode("ascii"))


if __name__ == "__main__":
    main()
