"""Masked image modelling: which pixels a token mask covers, and the error over them."""
from __future__ import annotations

import jax
import jax.numpy as jnp


def pixel_mask(mask: jax.Array, patch: int) -> jax.Array:
    """Token mask [B,h,w] -> pixel mask [B,h*patch,w*patch], each token's value over its patch."""
    return jnp.repeat(jnp.repeat(mask, patch, axis=1), patch, axis=2)


def masked_l1(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean absolute error over masked pixels and channels of the whole batch, as SimMIM normalises it.

    prediction, target: [B,H,W,C]. mask: [B,H,W], nonzero = the pixel counts. Returns a scalar, float32 or wider: sum of
    |target - prediction| over masked pixels / (masked pixels + 1e-5) / C, the divisor rounded to float32 as the
    reference's is (GFM, models/simmim.py); 0 where nothing is masked.
    """
    seen = mask != 0
    count = jnp.sum(seen, dtype=jnp.int32).astype(jnp.float32) + jnp.float32(1e-5)
    dtype = jnp.promote_types(jnp.promote_types(prediction.dtype, target.dtype), jnp.float32)
    error = jnp.abs(target.astype(dtype) - prediction.astype(dtype))
    return jnp.sum(jnp.where(seen[..., None], error, 0)) / count / target.shape[-1]
