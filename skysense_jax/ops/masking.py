"""Masked image modelling: which cells are hidden, which pixels a mask covers, and the error over them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def random_cells(rng: jax.Array, batch: int, side: int, ratio: float) -> jax.Array:
    """int32 [B,side,side], 1 = hidden: ceil(ratio * side^2) cells of each image, uniformly without replacement
    (SimMIM, data_simmim.py, MaskGenerator).
    """
    noise = jax.random.uniform(rng, (batch, side * side))
    hidden = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1) < math.ceil(ratio * side * side)
    return hidden.astype(jnp.int32).reshape(batch, side, side)


def pixel_mask(mask: jax.Array, patch: int) -> jax.Array:
    """Token mask [B,h,w] -> pixel mask [B,h*patch,w*patch], each token's value over its patch."""
    return jnp.repeat(jnp.repeat(mask, patch, axis=1), patch, axis=2)


def masked_sums(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(sum of |target - prediction| over what counts / C, number of pixels that count), scalars, float32 or wider.

    mask: [B,H,W,1], or [B,H,W,C] where bands differ: a pixel counts with the share of its bands that do.
    """
    seen, bands = mask != 0, target.shape[-1]
    dtype = jnp.promote_types(jnp.promote_types(prediction.dtype, target.dtype), jnp.float32)
    error = jnp.abs(target.astype(dtype) - prediction.astype(dtype))
    pixels = jnp.sum(seen, dtype=jnp.int32).astype(jnp.float32) / seen.shape[-1]
    return jnp.sum(jnp.where(seen, error, 0)) / bands, pixels
