"""The rates of a look as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from cpt.guard.yardstick import Json


def generation_table(events: Sequence[Json]) -> str:
    """Return the rates of all domains and measures.

    Args:
        events: `guard` lines of replies.
    """
    width = max([6, *(len(event["domain"]) for event in events)])
    lines = [
        "replies to prompts",
        f"  {'domain':<{width}}  {'measure':<15}  untouched    now   lost  won  loss  (at most)",
    ]
    for event in events:
        name = f"  {event['domain']:<{width}}  {event['measure']:<15}"
        if event["measure"] == "thinking_tokens":
            lines.append(f"{name}  {event['baseline']:9.1f}  {event['rate']:5.1f}  (mean tokens)")
            continue
        line = (
            f"{name}  {100 * event['baseline']:7.1f} %  {100 * event['rate']:3.0f} %"
            f"  {event['lost']:5}  {event['won']:3}"
        )
        if "delta" in event:
            line += (
                f"  {event['delta']:+.1f} ({event['upper_bound']:+.1f}) points of "
                f"{event['tolerance']:g}: {event['state']}"
            )
        if event.get("action", "none") != "none" and "delta" in event:
            line += "  WARNING"
        lines.append(line)
    return "\n".join(lines)
