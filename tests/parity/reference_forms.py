"""Losses in the form their papers and reference code write them, beside which the functions that training runs are
tested. Nothing outside the tests calls them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from skysense_jax.ops.masking import masked_sums


def centred_softmax(logits: jax.Array, centre: jax.Array, temperature: jax.Array | float) -> jax.Array:
    """The teacher's assignment softmax((logits - centre) / temperature); logits [..., K], centre broadcastable to
    them.
    """
    return jax.nn.softmax((logits - centre) / temperature, axis=-1)


def cross_entropy(student_logits: jax.Array, teacher_probs: jax.Array, temperature: float) -> jax.Array:
    """-sum_K p log softmax(student / temperature): [..., K], [..., K] -> [...]."""
    return -jnp.sum(teacher_probs * jax.nn.log_softmax(student_logits / temperature, axis=-1), axis=-1)


def dino_reduction(student_logits: jax.Array, teacher_probs: jax.Array, temperature: float, kind: str) -> jax.Array:
    """The loss over views as each member of the DINO family reduces it.

    Args:
        student_logits: [S, B, K], views of the student.
        teacher_probs: [T, B, K], the first T of these views through the teacher.
        temperature: of the student.
        kind: "v1" (dino main_dino.DINOLoss: mean over pairs with different index), "v2" (dinov2 DINOLoss.forward: sum
            over all pairs), "v3" (dinov3: mean over all pairs) or "v3_ignore_diagonal". All take the mean over B.

    Returns:
        A scalar.

    Raises:
        ValueError: for another kind.
    """
    if kind not in ("v1", "v2", "v3", "v3_ignore_diagonal"):
        raise ValueError(f"unknown reduction {kind!r}; known: v1, v2, v3, v3_ignore_diagonal")
    pairs = cross_entropy(student_logits[:, None], teacher_probs[None], temperature).mean(-1)  # [S, T]
    if kind == "v2":
        return pairs.sum()
    if kind == "v3":
        return pairs.mean()
    unequal = 1.0 - jnp.eye(*pairs.shape, dtype=pairs.dtype)
    return (pairs * unequal).sum() / unequal.sum()


def masked_l1(prediction: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean absolute error over masked pixels and channels of the whole batch, as SimMIM normalises it.

    Args:
        prediction: [B,H,W,C].
        target: [B,H,W,C].
        mask: [B,H,W], nonzero = the pixel counts.

    Returns:
        A scalar, float32 or wider: sum of |target - prediction| over masked pixels / (masked pixels + 1e-5) / C, the
        divisor rounded to float32 as the reference's is (GFM, models/simmim.py); 0 where nothing is masked.
    """
    error, pixels = masked_sums(prediction, target, mask[..., None])
    return error / (pixels + jnp.float32(1e-5))
