"""How far the rows that are left of a source let its share rise.

A mix with shares w_i of the tokens, of sources with t_i tokens in a row, takes w_i / t_i rows of
source i for each token, and sum_i w_i / t_i rows in all. A run is a number of rows, so the tokens
that it has follow from the shares: conversations of which few tokens are learned leave it few, and
it has more the more of it is plain text.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping


def largest_share(
    name: str,
    rows: int,
    rows_left: float,
    shares: Mapping[str, float],
    row_tokens: Mapping[str, float],
    side: Collection[str],
) -> float:
    """Return the share of a source with which it gives all the rows that are left of it.

    Args:
        name: The source.
        rows: Rows that the run still takes of all sources.
        rows_left: Rows that the source can still give.
        shares: Present share of every source in the tokens.
        row_tokens: Mean predicted tokens in a row of every source that has rows.
        side: The sources that rise with it, in proportion to their shares; all others fall.
    """
    rows_left = max(rows_left, 0.0)
    own_tokens = row_tokens[name]
    rising = [other for other in row_tokens if other in side]
    falling = [other for other in row_tokens if other not in side]
    all_rows = _rows_of_a_token(shares, row_tokens, row_tokens)
    others = _rows_of_a_token(shares, row_tokens, falling) or all_rows or 1 / own_tokens
    if shares[name] > 0:
        # the share s of the source is a part of what rises: others + slope * s rows for a token
        part = shares[name] / math.fsum(shares[other] for other in rising)
        slope = (_rows_of_a_token(shares, row_tokens, rising) - others) / part
        without = others
    else:
        slope = 1 / own_tokens - others
        without = all_rows or others
    # rows * s / own_tokens = rows_left * (without + slope * s)
    rows_of_share = rows / own_tokens - rows_left * slope
    return rows_left * without / rows_of_share if rows_of_share > 0 else math.inf


def _rows_of_a_token(
    shares: Mapping[str, float], row_tokens: Mapping[str, float], names: Collection[str]
) -> float:
    """Return the rows that one token of a group of sources takes; 0 if they have no share."""
    total = math.fsum(shares[name] for name in names)
    if total <= 0:
        return 0.0
    return math.fsum(shares[name] / row_tokens[name] for name in names) / total
