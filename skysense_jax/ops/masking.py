"""Masked image modelling: which cells are hidden, which pixels a mask covers, and the error over them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from skysense_jax.core.shapes import Image, Key, Mask, Scalar


def random_cells(rng: Key, batch: int, side: int, ratio: float) -> Mask:
    """Hide ceil(ratio * side^2) cells of each image, uniformly without replacement.

    As SimMIM does (data_simmim.py, MaskGenerator).

    Args:
        rng: random key.
        batch: number of images B.
        side: cells along an image.
        ratio: share of the cells to hide.

    Returns:
        int32 [B, side, side], 1 = hidden.
    """
    noise = jax.random.uniform(rng, (batch, side * side))
    hidden = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1) < math.ceil(ratio * side * side)
    return hidden.astype(jnp.int32).reshape(batch, side, side)


def pixel_mask(mask: Mask, patch: int) -> Mask:
    """A mask of tokens as a mask of pixels: each token's value over its patch.

    Args:
        mask: [B, h, w] of the tokens.
        patch: side of a patch in pixels.

    Returns:
        [B, h * patch, w * patch].
    """
    return jnp.repeat(jnp.repeat(mask, patch, axis=1), patch, axis=2)


def masked_sums(prediction: Image, target: Image, mask: Mask) -> tuple[Scalar, Scalar]:
    """The absolute error over masked pixels, and the number of these pixels.

    Args:
        prediction: [B, H, W, C].
        target: [B, H, W, C].
        mask: [B, H, W, 1], nonzero = the pixel counts; or [B, H, W, C] where bands differ: a pixel then counts with the
            share of its bands that do.

    Returns:
        (sum of |target - prediction| over what counts / C, number of pixels that count), float32 or wider.
    """
    counts, bands = mask != 0, target.shape[-1]
    dtype = jnp.promote_types(jnp.promote_types(prediction.dtype, target.dtype), jnp.float32)
    error = jnp.abs(target.astype(dtype) - prediction.astype(dtype))
    pixels = jnp.sum(counts, dtype=jnp.int32).astype(jnp.float32) / counts.shape[-1]
    return jnp.sum(jnp.where(counts, error, 0)) / bands, pixels
