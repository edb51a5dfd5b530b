"""Exponential moving average of parameter trees, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from skysense_jax.core.shapes import Scalar
from skysense_jax.core.trees import Tree


def ema(old: Tree, new: Tree, momentum: Scalar | float) -> Tree:
    """The moving average momentum * old + (1 - momentum) * new, leaf by leaf.

    Args:
        old: the average so far. Its leaves must be float32 or wider: an average kept in bfloat16 stalls, because its
            steps are below half a unit in the last place.
        new: a tree of the same structure and shapes.
        momentum: scalar in [0, 1] (DINO's lambda; may be traced).

    Returns:
        The average, in `old`'s dtypes.

    Raises:
        ValueError: a leaf of `old` is narrower than float32.
    """

    def averaged(average: jax.Array, value: jax.Array) -> jax.Array:
        if jnp.finfo(average.dtype).bits < 32:
            raise ValueError(f"a moving average in {average.dtype} stalls; keep it in float32")
        m = jnp.asarray(momentum, average.dtype)
        return average * m + value.astype(average.dtype) * (1 - m)

    return jax.tree.map(averaged, old, new)
