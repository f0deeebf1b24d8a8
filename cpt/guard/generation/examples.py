"""The replies that changed for the worse, as texts for people: what report.html shows.

untouched replies + replies of a look -> guard/generation/examples-STEP.json
"""

from __future__ import annotations

from collections.abc import Sequence

from cpt.guard.generation.measures import FORM_MEASURES, ReplyMeasures
from cpt.guard.generation.untouched import Json, Untouched
from data_pipeline.text.tokenizer import encoding

MEASURES = ("accuracy", *FORM_MEASURES)
"""Measures whose losses are shown, the first ones first."""
MAX_PER_MEASURE = 2
"""Replies that are shown of each measure of a domain."""
HEAD_CHARACTERS = 900
TAIL_CHARACTERS = 500


def worst_changes(
    untouched: Untouched,
    indices: Sequence[int],
    replies: Sequence[Sequence[int]],
    now: Sequence[ReplyMeasures],
) -> list[Json]:
    """Return the replies of one domain that lost the most, before and after.

    Every reply appears once, under the first measure that it lost. Those that lost more measures
    come first.

    Args:
        untouched: Replies of the untouched model.
        indices: The prompts of the look.
        replies: Tokens of the replies of the look.
        now: Their measures.
    """
    lost_by_place: dict[int, list[str]] = {}
    for place, index in enumerate(indices):
        lost = _lost_measures(untouched.measures[index], now[place])
        if lost:
            lost_by_place[place] = lost
    order = sorted(lost_by_place, key=lambda place: (-len(lost_by_place[place]), place))
    examples = []
    for measure in MEASURES:
        of_measure = [place for place in order if lost_by_place[place][0] == measure]
        for place in of_measure[:MAX_PER_MEASURE]:
            index = indices[place]
            examples.append(
                {
                    "measure": measure,
                    "lost": lost_by_place[place],
                    "prompt": shortened(untouched.prompts[index]),
                    "answers": untouched.answers[index],
                    "before": shortened(text_of(untouched.replies[index])),
                    "now": shortened(text_of(replies[place])),
                }
            )
    return examples


def _lost_measures(before: ReplyMeasures, now: ReplyMeasures) -> list[str]:
    return [name for name in MEASURES if before.value(name) and not now.value(name)]


def text_of(tokens: Sequence[int]) -> str:
    """Return the text of a reply, in which control tokens appear by name."""
    return encoding().decode(list(tokens))


def shortened(text: str) -> str:
    """Return a text, or the start and the end of a long one."""
    left = len(text) - HEAD_CHARACTERS - TAIL_CHARACTERS
    if left <= 0:
        return text
    return f"{text[:HEAD_CHARACTERS]}\n[... {left:,} characters ...]\n{text[-TAIL_CHARACTERS:]}"
