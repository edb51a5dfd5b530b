"""Sinkhorn-Knopp in the log domain: a balanced soft assignment of rows (samples) to columns (prototypes, clusters).

Alternating normalisation of exp(scores) to equal column masses and equal row masses (Cuturi 2013; the order column
first, then row, and the number of iterations as in SwAV `distributed_sinkhorn` and DINOv2 `sinkhorn_knopp_teacher`,
which agree with each other). Working on logarithms replaces their global-maximum subtraction and cannot overflow,
whatever the temperature. The rows may be sharded over devices: every reduction is a plain sum over an axis, so under
jit the compiler makes it global.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from skysense_jax.core.shapes import Logits, Mask

NEGATIVE = -1e30
"""Logarithm of the mass of a masked entry: finite, so that no subtraction makes a NaN."""


def sinkhorn(
    scores: Logits, iterations: int, row_mask: Mask | None = None, column_mask: Mask | None = None
) -> jax.Array:
    """Balanced assignment of rows to columns.

    Args:
        scores: [..., N, K], already divided by the temperature (epsilon); leading axes are independent problems.
        iterations: at least 1.
        row_mask: [..., N], nonzero = the row takes part; None: all do.
        column_mask: [..., K], nonzero = the column takes part; None: all do.

    Returns:
        [..., N, K] float32 (float64 for float64 scores). Every row that takes part sums to 1, the columns that take
        part carry nearly equal mass (exactly before the last row step), everything masked is exactly 0. With all rows
        masked everything is 0, never NaN.

    Raises:
        ValueError: iterations < 1.
    """
    if iterations < 1:
        raise ValueError(f"sinkhorn needs at least one iteration, got {iterations}")
    log_mass = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    keep = jnp.ones(scores.shape, bool)
    if row_mask is not None:
        keep &= (row_mask != 0)[..., :, None]
    if column_mask is not None:
        keep &= (column_mask != 0)[..., None, :]

    log_mass = jnp.where(keep, log_mass, NEGATIVE)
    for axis in (-2, -1) * iterations:
        # The equal marginals 1/K and 1/N are common factors; the last row step makes them immaterial.
        log_mass = log_mass - jax.nn.logsumexp(log_mass, axis=axis, keepdims=True)
        log_mass = jnp.where(keep, log_mass, NEGATIVE)
    return jnp.where(keep, jnp.exp(log_mass), 0.0)
