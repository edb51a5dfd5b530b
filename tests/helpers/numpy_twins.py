"""Plain numpy in float64 that several tests compare with; nothing is shared with the implementation."""

import numpy as np


def np_sinkhorn(scores, iterations, rows=None, columns=None):
    """Plain domain, on the rows and columns that take part only: nothing shared with the log-domain implementation."""
    rows = np.ones(scores.shape[0], bool) if rows is None else rows.astype(bool)
    columns = np.ones(scores.shape[1], bool) if columns is None else columns.astype(bool)
    out = np.zeros(scores.shape)
    part = scores[rows][:, columns].astype(np.float64)
    if part.size == 0:
        return out
    q = np.exp(part - part.max())
    n, k = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q = q / q.sum(0) / k
        q = q / q.sum(1, keepdims=True) / n
    out[np.ix_(rows, columns)] = q * n
    return out
