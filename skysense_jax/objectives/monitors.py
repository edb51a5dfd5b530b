"""What shows a collapse of self-distillation: numbers of a head that no gradient comes from.

objectives.skysense says what each number means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from skysense_jax.objectives.granularity import Totals
from skysense_jax.ops import contrast

Scalars = dict[str, jax.Array]


def teacher_monitors(totals: Mapping[str, Totals], losses: Scalars, usage: jax.Array, centre: jax.Array) -> Scalars:
    """Means over the granularities that have rows.

    Args:
        totals: {granularity: sums over its rows}.
        losses: {granularity: mean cross-entropy}.
        usage: [K] the summed assignment of the teacher.
        centre: [K] of the teacher's logits.

    Returns:
        {"teacher/...": scalar}.
    """
    seen = contrast.add_up((x.weight > 0).astype(jnp.float32) for x in totals.values())
    entropy = contrast.safe_mean(
        contrast.add_up(contrast.safe_mean(x.entropy, x.weight) for x in totals.values()), seen
    )
    return {
        "teacher/entropy": entropy / math.log(centre.shape[-1]),
        "teacher/kl": contrast.safe_mean(contrast.add_up(losses.values()), seen) - entropy,
        "teacher/usage": prototype_usage(usage),
        "teacher/centre": jnp.sqrt(jnp.mean(centre**2)),
    }


def prototype_usage(assigned: jax.Array) -> jax.Array:
    """exp(entropy of the mean assignment) / K, from summed assignments [K]; 0 where nothing was assigned."""
    share = contrast.safe_mean(assigned, assigned.sum())
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
    return jnp.where(assigned.sum() > 0, jnp.exp(entropy) / assigned.shape[-1], 0.0)


def feature_std(features: jax.Array, mask: jax.Array) -> jax.Array:
    """How far image features spread: 0 = they are constant, 1 = isotropic.

    Args:
        features: [B, S, T, 1, D].
        mask: [B, S, T, 1].

    Returns:
        The standard deviation over the views of the batch of L2-normalised, date-averaged features, mean over channels,
        times sqrt(D).
    """
    features, mask = jax.lax.stop_gradient((features, mask))
    x = contrast.normalise(jnp.sum(features * mask[..., None], axis=(2, 3), dtype=jnp.float32))  # [B, S, D]
    weight = mask.max((2, 3))[..., None]  # [B, S, 1]
    mass = weight.sum()
    mean = contrast.safe_mean((x * weight).sum((0, 1)), mass)
    variance = contrast.safe_mean((jnp.square(x - mean) * weight).sum((0, 1)), mass)
    return jnp.sqrt(variance).mean() * math.sqrt(x.shape[-1])
