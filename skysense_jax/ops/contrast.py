"""Losses between two networks (self-distillation over prototypes, DINO) and between two sensors (symmetric InfoNCE).

Rows carry weights (0 = padded date, invalid cell, no overlap); every mean divides safely, so that a term without a
single row is exactly 0 with zero gradient. Reductions run over the global batch: under jit with a sharded batch the
compiler inserts the collectives. Reductions of the DINO family differ (checked against the reference code): v1 = mean
over pairs of unequal views, v2 = sum over all pairs, v3 = mean over all pairs, or over unequal ones; the weights of
:func:`distil` express all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from skysense_jax.core.mesh import batch_axes
from skysense_jax.core.shapes import Features, Mask, Scalar
from skysense_jax.core.sharding import one_each
from skysense_jax.ops.unit import unit


def safe_mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """A sum divided by its weight, and 0 with zero gradient where the weight is 0.

    Args:
        total: [...] weighted sums.
        weight: [...] sums of the weights.

    Returns:
        [...].
    """
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1.0), 0.0)


def add_up(values: Iterable[jax.Array]) -> jax.Array:
    """The sum of float32 arrays of one shape; 0 of none."""
    return sum(values, start=jnp.float32(0))


def normalise(x: Features) -> Features:
    """Unit vectors over the last axis by the losses' rule: :func:`ops.unit.unit` with "clamp"."""
    return unit(x, "clamp")


def update_centre(centre: jax.Array, mean_logits: jax.Array, seen: jax.Array, momentum: float) -> jax.Array:
    """DINO's centre after a batch: momentum * centre + (1 - momentum) * mean of the teacher's logits.

    Args:
        centre: [K] so far.
        mean_logits: [K] of the batch.
        seen: scalar, 0 = the batch has no logits; the centre then stays.
        momentum: in [0, 1].

    Returns:
        [K].
    """
    return jnp.where(seen > 0, momentum * centre + (1 - momentum) * mean_logits, centre)


def distil(
    student: jax.Array,
    teacher: jax.Array,
    weight: jax.Array,
    student_prototypes: jax.Array,
    teacher_prototypes: jax.Array,
    centre: jax.Array,
    student_temp: float,
    teacher_temp: jax.Array | float,
    chunk: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Self-distillation of rows, without ever holding the logits of more than `chunk` rows of each place.

    The loss of a row is sum_m weight_m * CE(teacher_m, student), linear in the teacher's assignment, so that the
    student's logits are computed once. With n > chunk the rows are scanned in pieces that are rematerialised in the
    backward pass (65,536 prototypes x 16,000 rows of a sample would be 4 GB), each device scanning its own places: the
    pieces' gradients are summed over devices once.

    Args:
        student: [B, n, d] normalised bottleneck vectors.
        teacher: [B, n, M, d], M targets for each student row.
        weight: [B, n, M] >= 0.
        student_prototypes: [d, K] float32.
        teacher_prototypes: [d, K] float32.
        centre: [K] subtracted from the teacher's logits.
        student_temp: temperature of the student's softmax.
        teacher_temp: temperature of the teacher's softmax.
        chunk: rows of a place whose logits may be held at once.

    Returns:
        (ce [B, n] = weighted cross-entropies, entropy [B, n] = weighted teacher entropies, assigned [K] = sum of weight
        * teacher assignment), float32. Only `ce` carries gradient, and only into the student's side.
    """
    teacher, centre = jax.lax.stop_gradient((teacher, centre))
    teacher_prototypes, weight = jax.lax.stop_gradient((teacher_prototypes, weight))

    def rows(
        zs: jax.Array, zt: jax.Array, w: jax.Array, prototypes: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Cast here, not before the scan: the prototypes' gradient then sums over the pieces in float32.
        student_last, teacher_last = prototypes.astype(zs.dtype), teacher_prototypes.astype(zt.dtype)
        s = jnp.einsum("bnd,dk->bnk", zs, student_last, preferred_element_type=jnp.float32) / student_temp
        t = jnp.einsum("bnmd,dk->bnmk", zt, teacher_last, preferred_element_type=jnp.float32)
        log_p = jax.nn.log_softmax((t - centre) / teacher_temp, axis=-1)
        p = jnp.exp(log_p)
        weighted = jnp.sum(w[..., None] * p, axis=2)
        ce = w.sum(-1) * jax.nn.logsumexp(s, axis=-1) - jnp.sum(weighted * s, axis=-1)
        entropy = -jnp.sum(w * jnp.sum(p * log_p, axis=-1), axis=-1)
        return ce, jax.lax.stop_gradient(entropy), jax.lax.stop_gradient(weighted.sum((0, 1)))

    batch, n = weight.shape[:2]
    if n <= chunk:
        return rows(student, teacher, weight, student_prototypes)

    pieces = -(-n // chunk)
    size = -(-n // pieces)  # equal pieces: at most pieces - 1 rows of padding, with weight 0

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, pieces * size - n)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], pieces, size, *x.shape[2:]), 1, 0)

    def scanned(
        zs: jax.Array, zt: jax.Array, w: jax.Array, prototypes: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        def step(
            assigned: jax.Array, piece: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
            ce, entropy, more = jax.checkpoint(rows, prevent_cse=False)(*piece, prototypes)
            return assigned + more, (ce, entropy)

        start = jnp.zeros(prototypes.shape[-1], jnp.float32)
        assigned, (ce, entropy) = jax.lax.scan(step, start, (split(zs), split(zt), split(w)))
        ce, entropy = (jnp.moveaxis(x, 0, 1).reshape(-1, pieces * size)[:, :n] for x in (ce, entropy))
        return ce, entropy, assigned

    if (devices := math.prod(batch_axes().values())) == 1:
        return scanned(student, teacher, weight, student_prototypes)
    zs, zt, w = (x.reshape(devices, batch // devices, *x.shape[1:]) for x in (student, teacher, weight))
    ce, entropy, assigned = jax.vmap(scanned)(zs, zt, w, one_each(student_prototypes))
    return ce.reshape(batch, n), entropy.reshape(batch, n), assigned.sum(0)


def info_nce(a: Features, b: Features, valid: Mask, temperature: float) -> Scalar:
    """Symmetric InfoNCE between two sensors' regions, in both directions, over the global batch.

    The positive of (place, region) in one sensor is the same (place, region) in the other. Negatives are all valid
    regions of *other* places; the other regions of the same place (same view or not) are in neither set, because they
    may show the same ground.

    Args:
        a: [B, n, d] L2-normalised region vectors of one sensor, row (place, region).
        b: [B, n, d] of the other sensor.
        valid: [B, n], nonzero = both sensors see the region.
        temperature: by which similarities are divided.

    Returns:
        The mean over valid regions and both directions, a float32 scalar; 0 where no region is valid.
    """
    places = a.shape[0]
    valid = (valid != 0).astype(jnp.float32)
    similarity = jnp.einsum("bid,cjd->bicj", a, b, preferred_element_type=jnp.float32) / temperature
    positive = jnp.einsum("bid,bid->bi", a, b, preferred_element_type=jnp.float32) / temperature
    other = (1.0 - jnp.eye(places))[:, None, :, None] * valid[:, :, None, None] * valid[None, None]  # [B, n, B, n]
    similarity = jnp.where(other > 0, similarity, -1e30)

    def direction(axes: tuple[int, int]) -> jax.Array:
        negatives = jax.nn.logsumexp(similarity, axis=axes)  # [B, n] of the anchors
        return jnp.logaddexp(positive, negatives) - positive

    loss = (direction((2, 3)) + direction((0, 1))) / 2
    return safe_mean(jnp.sum(jnp.where(valid > 0, loss, 0.0)), jnp.sum(valid))
