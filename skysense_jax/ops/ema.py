"""Exponential moving average of parameter trees, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def ema(old: Any, new: Any, momentum: jax.Array | float) -> Any:
    """momentum * old + (1 - momentum) * new, leaf by leaf.

    old, new: trees of the same structure and shapes. momentum: scalar in [0, 1] (DINO's lambda; may be traced).
    The result has `old`'s dtypes, which must be float32 or wider: an average kept in bfloat16 stalls, because its steps
    are below half a unit in the last place. Raises ValueError for a narrower leaf.
    """

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        if jnp.finfo(a.dtype).bits < 32:
            raise ValueError(f"a moving average in {a.dtype} stalls; keep it in float32")
        m = jnp.asarray(momentum, a.dtype)
        return a * m + b.astype(a.dtype) * (1 - m)

    return jax.tree.map(one, old, new)
