"""A batch through the encoder in parts, one after the other: less memory, the same gradient."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from skysense_jax.core.trees import Tree


def in_parts(function: Callable[..., Tree], parts: int, places: Tree, rng: jax.Array | None) -> Tree:
    """function(places, rng) of one part of the places after the other, and the results together again, in order.

    Only what the backward pass keeps is held for all B at once; the losses behind see all places together, so that the
    gradient is that of the whole batch. Place i goes to part i mod `parts`: with a batch split over devices every
    device has its share of each part.

    Args:
        function: of places and a key.
        parts: their number; divides B.
        places: leaves [B, ...].
        rng: each part gets a key of its own, where there is one.

    Returns:
        What the function returns of all places, leaves [B, ...].
    """
    if parts == 1:
        return function(places, rng)

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

    def apply(part: tuple[Tree, jax.Array]) -> Tree:
        part_places, number = part
        return function(part_places, None if rng is None else jax.random.fold_in(rng, number))

    out = jax.lax.map(apply, (jax.tree.map(split, places), jnp.arange(parts)))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), out)
