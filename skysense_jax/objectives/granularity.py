"""Pixel, object and image rows of two networks' maps: what is compared with what, and with which weight.

Shapes: B places, S views of the student, M views of the teacher they are compared with, T dates, N and N' cells, D
width, C clusters. The k-th date of one view is compared with the k-th date of the other (L_pix, L_obj, L_img of the
SkySense paper, section "multi-granularity contrastive learning"). The correspondence of cells is a matrix, so that
every gather is a small matrix product: nothing is gathered across devices when the places are sharded, and a matched
cell without partner is simply a zero row.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.ops import clusters, contrast
from skysense_jax.ops.crops import match_cells

NAMES = ("pixel", "object", "image")


class Cells(NamedTuple):
    """Maps of several views of one sensor. features: [B, S, T, N, D]; mask: [B, S, T, N] float 0/1 (a padded date is
    all 0).
    """

    features: jax.Array
    mask: jax.Array


class Rows(NamedTuple):
    """Weighted pairs of bottleneck vectors. student: [B, n, d]; teacher: [B, n, M, d]; weight: [B, n, M]."""

    student: jax.Array
    teacher: jax.Array
    weight: jax.Array


def overlap(coords_a: jax.Array, coords_b: jax.Array, cell_a: jax.Array, cell_b: jax.Array) -> jax.Array:
    """[..., N, N'] float32: 1 where cell n' of view b is the match of cell n of view a (at most one per row); see
    ops.crops.match_cells.
    """
    index, matched = match_cells(coords_a, coords_b, cell_a, cell_b)
    return jax.nn.one_hot(index, coords_b.shape[-3] * coords_b.shape[-2], dtype=jnp.float32) * matched[..., None]


def image_means(cells: Cells) -> Cells:
    """Mean over the valid cells: features [B, S, T, 1, D] in the maps' dtype, mask 1 where a date has a valid cell."""
    mean, mass = clusters.centres(cells.features, cells.mask[..., None])
    return Cells(mean.astype(cells.features.dtype), (mass > 0).astype(jnp.float32))


def assignment(teacher: Cells, seeds: np.ndarray, epsilon: float, iterations: int) -> jax.Array:
    """[B, M, T, N', C]: clusters of the teacher's cells, per view and date; without gradient."""
    return jax.lax.stop_gradient(clusters.assign(teacher.features, teacher.mask, seeds, epsilon, iterations))


def paired(function, student: tuple, teacher: tuple, across: tuple, every: bool):
    """Maps `function(student..., teacher..., across...)` over the pairs of views.

    student: arrays [B, S, ...]; teacher: arrays [B, M, ...]. every=False: student view s with teacher view s (S = M),
    across [B, S, ...], results [B, S, 1, ...]. every=True: each with each, across [B, S, M, ...], results [B, S, M,
    ...]. `function` sees arrays without view axes.
    """
    n, k, a = len(student), len(teacher), len(across)
    if not every:
        result = jax.vmap(function, in_axes=1, out_axes=1)(*student, *teacher, *across)
        return jax.tree.map(lambda x: x[:, :, None], result)
    inner = jax.vmap(function, in_axes=(None,) * n + (1,) * (k + a), out_axes=1)  # over M
    return jax.vmap(inner, in_axes=(1,) * n + (None,) * k + (1,) * a, out_axes=1)(*student, *teacher, *across)  # over S


def pixel_targets(
    student: Cells, teacher: Cells, vectors: jax.Array, match: jax.Array, every: bool
) -> tuple[jax.Array, jax.Array]:
    """The teacher's vectors [B, M, T, N', d] brought to the student's cells.

    Returns (targets [B, S, M, T, N, d], weight [B, S, M, T, N] = both cells valid and matched).
    """

    def one(mask, other_mask, z, p):
        return jnp.einsum("bnk,btkd->btnd", p, z), mask * jnp.einsum("bnk,btk->btn", p, other_mask)

    return paired(one, (student.mask,), (teacher.mask, vectors), (match,), every)


def objects(
    student: Cells, teacher: Cells, assigned: jax.Array, match: jax.Array, every: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cluster centres of both networks over the same ground.

    The teacher's assignment [B, M, T, N', C] is carried to the student's matched cells; both centres are means over the
    matched cells only, with the same weights, so that they differ by network and view and not by ground. Returns
    (student centres [B, P, T, C, D], teacher centres [B, P, T, C, D], weight [B, P, T, C]), P = the pairs of views: a
    cluster counts by its matched mass in cells, up to 1.
    """
    dtype = student.features.dtype

    def one(features, mask, other, assigned, p):
        carried = jnp.einsum("bnk,btkc->btnc", p, assigned) * mask[..., None]
        back = jnp.einsum("bnk,btnc->btkc", p, carried)
        mine, mass = clusters.centres(features, carried)
        theirs, _ = clusters.centres(other, back)
        return mine.astype(dtype), theirs.astype(dtype), jnp.minimum(mass, 1.0)

    pairs = paired(one, (student.features, student.mask), (teacher.features, assigned), (match,), every)
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), pairs)


def image_targets(student: Cells, teacher: Cells, vectors: jax.Array, every: bool) -> tuple[jax.Array, jax.Array]:
    """Targets [B, S, M, T, 1, d] and weight [B, S, M, T, 1] of the image rows (cells made by :func:`image_means`)."""

    def one(mask, other_mask, z):
        return z, mask * other_mask

    return paired(one, (student.mask,), (teacher.mask, vectors), (), every)


def rows(vectors: jax.Array, targets: jax.Array, weight: jax.Array, dates: slice) -> Rows:
    """Rows of the given dates: vectors [B, S, T, n, d] against targets [B, S, M, T, n, d], weight [B, S, M, T, n].

    Each weight is divided by n: a pair of views counts by the share of its cells that are valid and matched, whatever
    the size of its map.
    """
    vectors, targets, weight = vectors[:, :, dates], targets[:, :, :, dates], weight[:, :, :, dates]
    b, m, n, d = vectors.shape[0], targets.shape[2], *vectors.shape[-2:]
    targets, weight = jnp.moveaxis(targets, 2, -2), jnp.moveaxis(weight, 2, -1)
    return Rows(vectors.reshape(b, -1, d), targets.reshape(b, -1, m, d), weight.reshape(b, -1, m) / n)


class Totals(NamedTuple):
    """Sums over the rows of one granularity, scalars: weighted cross-entropy (differentiable), weighted teacher
    entropy, weight.
    """

    ce: jax.Array
    entropy: jax.Array
    weight: jax.Array


def distil_groups(
    groups: list[dict[str, Rows]],
    student_prototypes: jax.Array,
    teacher_prototypes: jax.Array,
    centre: jax.Array,
    student_temp: float,
    teacher_temp: jax.Array,
    chunk: int,
) -> tuple[dict[str, Totals], jax.Array]:
    """Self-distillation of several groups of rows, one call of the loss per group (the rows of a group have the same
    M).

    Keys of a group: a granularity, with anything after a "/" to tell two kinds of rows apart. Returns ({granularity:
    Totals over all groups}, assigned [K]).
    """
    zero = jnp.float32(0)
    totals = {name: Totals(zero, zero, zero) for name in NAMES}
    assigned = jnp.zeros(centre.shape, jnp.float32)
    for group in groups:
        whole = Rows(*(jnp.concatenate(part, axis=1) for part in zip(*group.values())))
        ce, entropy, share = contrast.distil(
            *whole, student_prototypes, teacher_prototypes, centre, student_temp, teacher_temp, chunk
        )
        assigned, start = assigned + share, 0
        for name, part in group.items():
            stop = start + part.weight.shape[1]
            more = Totals(ce[:, start:stop].sum(), entropy[:, start:stop].sum(), part.weight.sum())
            totals[name.split("/")[0]] = jax.tree.map(jnp.add, totals[name.split("/")[0]], more)
            start = stop
    return totals, assigned
