"""Vectors of length 1. The numpy twin for evaluations is `skysense_jax.evals.unit`."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from skysense_jax.core.shapes import Features

EPS = 1e-12
"""Length below which a vector counts as zero: torch.nn.functional.normalize's."""

Rule = Literal["zero", "clamp"]


def unit(x: Features, rule: Rule, axis: int = -1) -> Features:
    """Vectors divided by their length, in float32 or wider.

    Both rules stand for torch.nn.functional.normalize, x / max(|x|, EPS), which the SkySense release's cosine attention
    and DINO's head call. They differ in what happens to vectors shorter than EPS:

    "zero"   the vector becomes 0 and gets a gradient of exactly 0. For layers: torch's gradient g / EPS is multiplied
             by exact zeros wherever the reference meets a zero vector (padding), and would explode a bias wherever it
             is not.
    "clamp"  x / EPS with the gradient g / EPS: torch's formula to the letter, a finite number of 1e12 times g at 0. For
             losses and the prototype bank, where a zero vector is masked or has no gradient.

    Elsewhere they agree up to rounding: "zero" multiplies by 1 / sqrt, "clamp" divides by sqrt. Neither replaces the
    other as long as the bits of trained runs are to stay.

    Args:
        x: [..., D] vectors, any float dtype.
        rule: what happens at zero, "zero" or "clamp".
        axis: along which the vectors lie.

    Returns:
        The unit vectors, the shape of x, float32 (float64 for float64).

    Raises:
        ValueError: the rule is neither.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    if rule == "clamp":
        return x / jnp.sqrt(jnp.maximum(square, EPS * EPS))
    if rule != "zero":
        raise ValueError(f"no rule {rule!r} for the length of a zero vector; there are 'zero' and 'clamp'")
    alive = square > EPS * EPS
    return jnp.where(alive, x * jax.lax.rsqrt(jnp.where(alive, square, 1.0)), 0.0)
