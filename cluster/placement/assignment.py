"""The assignment problem: which new column each row becomes, for the largest sum."""

from __future__ import annotations

import numpy as np


def best_assignment(worth: np.ndarray) -> np.ndarray:
    """The column of every row for the largest sum of `worth` (n, n); -inf forbids a pair.

    Kuhn and Munkres's method with potentials, one row at a time (Jonker and Volgenant's form), O(n^3). There must be an
    assignment without forbidden pairs; the identity is always one where it is used here.
    """
    n = len(worth)
    finite = worth[np.isfinite(worth)]
    forbidden = (np.abs(finite).max(initial=0.0) + 1.0) * (n + 1)
    cost = np.where(np.isfinite(worth), -worth, forbidden)
    row_price, column_price = np.zeros(n), np.zeros(n + 1)
    row_of = np.full(n + 1, -1)  # by column; the last one is where a row enters
    for row in range(n):
        row_of[n] = row
        column, slack, came_from = n, np.full(n, np.inf), np.full(n, n)
        done = np.zeros(n + 1, dtype=bool)
        while row_of[column] >= 0:
            done[column] = True
            at = row_of[column]
            reduced = cost[at] - row_price[at] - column_price[:n]
            better = ~done[:n] & (reduced < slack)
            slack[better], came_from[better] = reduced[better], column
            open_slack = np.where(done[:n], np.inf, slack)
            nearest = int(open_slack.argmin())
            delta = open_slack[nearest]
            row_price[row_of[done]] += delta
            column_price[done] -= delta
            slack[~done[:n]] -= delta
            column = nearest
        while column != n:
            row_of[column] = row_of[came_from[column]]
            column = came_from[column]
    columns = np.empty(n, dtype=np.int64)
    columns[row_of[:n]] = np.arange(n)
    return columns
