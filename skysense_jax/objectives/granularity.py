"""Pixel, object and image rows of two networks' maps: what is compared with what, and with which weight.

Shapes: B places, S views of the student, M views of the teacher they are compared with, T dates, N and N' cells, D
width, C clusters. The k-th date of one view is compared with the k-th date of the other, whatever acquisitions they are
(L_pix, L_obj, L_img of the SkySense paper, section "multi-granularity contrastive learning"). The correspondence of
cells is a matrix, so that every gather is a small matrix product: nothing is gathered across devices when the places
are sharded, and a cell without a partner is a zero row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.core.trees import Tree
from skysense_jax.ops import clusters, contrast
from skysense_jax.ops.crops import match_cells

NAMES = ("pixel", "object", "image")

Arrays = tuple[jax.Array, ...]
Pairing = Callable[[Callable[..., Tree], Arrays, Arrays, Arrays], Tree]
"""Which views of the student meet which of the teacher: zip_views (the global ones, the teacher's swapped) or
cross_views (the local ones).
"""


class Cells(NamedTuple):
    """Maps of several views of one sensor.

    features: [B, S, T, N, D]; mask: [B, S, T, N] float 0/1 (a padded date is all 0).
    """

    features: jax.Array
    mask: jax.Array


class Rows(NamedTuple):
    """Weighted pairs of bottleneck vectors. student: [B, n, d]; teacher: [B, n, M, d]; weight: [B, n, M]."""

    student: jax.Array
    teacher: jax.Array
    weight: jax.Array


def overlap(coords_a: jax.Array, coords_b: jax.Array, cell_a: jax.Array, cell_b: jax.Array) -> jax.Array:
    """The correspondence of the cells of two views as a matrix; see ops.crops.match_cells.

    Args:
        coords_a: [..., h, w, 2] centres of the cells of view a in base pixels of the place.
        coords_b: [..., h', w', 2] likewise of view b.
        cell_a: [...] side of a cell of view a in base pixels.
        cell_b: [...] likewise of view b.

    Returns:
        [..., N, N'] float32: 1 where cell n' of view b is the match of cell n of view a, at most one per row.
    """
    index, matched = match_cells(coords_a, coords_b, cell_a, cell_b)
    return jax.nn.one_hot(index, coords_b.shape[-3] * coords_b.shape[-2], dtype=jnp.float32) * matched[..., None]


def image_means(cells: Cells) -> Cells:
    """Means over the valid cells of every view and date.

    Args:
        cells: maps [B, S, T, N, D].

    Returns:
        Cells with one cell per date: features [B, S, T, 1, D] in the maps' dtype, mask 1 where a date has a valid cell.
    """
    mean, mass = clusters.centres(cells.features, cells.mask[..., None])
    return Cells(mean.astype(cells.features.dtype), (mass > 0).astype(jnp.float32))


def assignment(teacher_cells: Cells, seeds: np.ndarray, epsilon: float, iterations: int) -> jax.Array:
    """Soft, balanced clusters of the teacher's cells, for each view and date on its own; without gradient.

    Args:
        teacher_cells: maps [B, M, T, N', D].
        seeds: [C] indices of the cells that the clusters start from (ops.clusters.seed_cells).
        epsilon: Sinkhorn's temperature on the cosine.
        iterations: of Sinkhorn.

    Returns:
        [B, M, T, N', C] float32: the shares of a valid cell in the clusters sum to 1, those of another are 0.
    """
    return jax.lax.stop_gradient(
        clusters.assign(teacher_cells.features, teacher_cells.mask, seeds, epsilon, iterations)
    )


def zip_views(function: Callable[..., Tree], student: Arrays, teacher: Arrays, pair: Arrays) -> Tree:
    """Maps a function over pairs of views: view s of the student with view s of the teacher, as `zip` does.

    Args:
        function: of the arrays of `student`, `teacher` and `pair`, all without their axes of views; returns arrays with
            the leading axis B.
        student: arrays [B, S, ...].
        teacher: arrays [B, S, ...].
        pair: arrays [B, S, ...], what belongs to both views of a pair.

    Returns:
        What the function returns, as arrays [B, S, 1, ...].
    """
    result = jax.vmap(function, in_axes=1, out_axes=1)(*student, *teacher, *pair)
    return jax.tree.map(lambda x: x[:, :, None], result)


def cross_views(function: Callable[..., Tree], student: Arrays, teacher: Arrays, pair: Arrays) -> Tree:
    """Maps a function over pairs of views: each view of the student with each of the teacher, as a nested loop does.

    Args:
        function: as for :func:`zip_views`.
        student: arrays [B, S, ...].
        teacher: arrays [B, M, ...].
        pair: arrays [B, S, M, ...], what belongs to both views of a pair.

    Returns:
        What the function returns, as arrays [B, S, M, ...].
    """
    n, m, p = len(student), len(teacher), len(pair)
    teacher_views = jax.vmap(function, in_axes=(None,) * n + (1,) * (m + p), out_axes=1)
    student_views = jax.vmap(teacher_views, in_axes=(1,) * n + (None,) * m + (1,) * p, out_axes=1)
    return student_views(*student, *teacher, *pair)


def pixel_targets(
    student_cells: Cells, teacher_cells: Cells, vectors: jax.Array, match: jax.Array, pairing: Pairing
) -> tuple[jax.Array, jax.Array]:
    """The teacher's vectors brought to the student's cells over the same ground.

    Args:
        student_cells: maps [B, S, T, N, D], of which the mask counts.
        teacher_cells: maps [B, M, T, N', D], of which the mask counts.
        vectors: [B, M, T, N', d] of the teacher's cells.
        match: of the pairs of views, [B, S, N, N'] to zip them, [B, S, M, N, N'] to cross them.
        pairing: zip_views or cross_views; zipped views have M = 1 below.

    Returns:
        targets [B, S, M, T, N, d], and weight [B, S, M, T, N]: 1 where both cells are valid and match.
    """

    def pair(
        student_mask: jax.Array, teacher_mask: jax.Array, vectors: jax.Array, match: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        targets = jnp.einsum("bnk,btkd->btnd", match, vectors)
        return targets, student_mask * jnp.einsum("bnk,btk->btn", match, teacher_mask)

    return pairing(pair, (student_cells.mask,), (teacher_cells.mask, vectors), (match,))


def objects(
    student_cells: Cells, teacher_cells: Cells, assigned: jax.Array, match: jax.Array, pairing: Pairing
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cluster centres of both networks over the same ground.

    The teacher's assignment is carried to the student's matched cells; both centres are means over the matched cells
    only, with the same weights, so that they differ by network and view and not by ground.

    Args:
        student_cells: maps [B, S, T, N, D].
        teacher_cells: maps [B, M, T, N', D].
        assigned: [B, M, T, N', C] of the teacher's cells, see :func:`assignment`.
        match: of the pairs of views, [B, S, N, N'] to zip them, [B, S, M, N, N'] to cross them.
        pairing: zip_views or cross_views.

    Returns:
        student centres [B, P, T, C, D], teacher centres [B, P, T, C, D], weight [B, P, T, C], P = the pairs of views: a
        cluster counts by its matched mass in cells, up to 1.
    """
    dtype = student_cells.features.dtype

    def pair(
        student: jax.Array, student_mask: jax.Array, teacher: jax.Array, assigned: jax.Array, match: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        student_shares = jnp.einsum("bnk,btkc->btnc", match, assigned) * student_mask[..., None]
        teacher_shares = jnp.einsum("bnk,btnc->btkc", match, student_shares)
        student_centres, mass = clusters.centres(student, student_shares)
        teacher_centres, _ = clusters.centres(teacher, teacher_shares)
        return student_centres.astype(dtype), teacher_centres.astype(dtype), jnp.minimum(mass, 1.0)

    pairs = pairing(pair, tuple(student_cells), (teacher_cells.features, assigned), (match,))
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), pairs)


def image_targets(
    student_images: Cells, teacher_images: Cells, vectors: jax.Array, pairing: Pairing
) -> tuple[jax.Array, jax.Array]:
    """The teacher's vectors of whole images for each view of the student.

    Args:
        student_images: [B, S, T, 1, D], made by :func:`image_means`, of which the mask counts.
        teacher_images: [B, M, T, 1, D], likewise.
        vectors: [B, M, T, 1, d] of the teacher's images.
        pairing: zip_views or cross_views; zipped views have M = 1 below.

    Returns:
        targets [B, S, M, T, 1, d], and weight [B, S, M, T, 1]: 1 where both images have a valid cell.
    """

    def pair(student_mask: jax.Array, teacher_mask: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        return vectors, student_mask * teacher_mask

    return pairing(pair, (student_images.mask,), (teacher_images.mask, vectors), ())


def rows(vectors: jax.Array, targets: jax.Array, weight: jax.Array, dates: slice) -> Rows:
    """Rows of some dates; every weight is divided by n, the number of cells.

    So a pair of views counts by the share of its cells that are valid and matched, whatever the size of its map.

    Args:
        vectors: [B, S, T, n, d] of the student.
        targets: [B, S, M, T, n, d] of the teacher.
        weight: [B, S, M, T, n].
        dates: which of the T.

    Returns:
        Rows: one for each view, date and cell of the student, with M targets.
    """
    vectors, targets, weight = vectors[:, :, dates], targets[:, :, :, dates], weight[:, :, :, dates]
    b, m, n, d = vectors.shape[0], targets.shape[2], *vectors.shape[-2:]
    targets, weight = jnp.moveaxis(targets, 2, -2), jnp.moveaxis(weight, 2, -1)
    return Rows(vectors.reshape(b, -1, d), targets.reshape(b, -1, m, d), weight.reshape(b, -1, m) / n)


class Prototypes(NamedTuple):
    """The last layers of a head, and how their logits become distributions (ops.contrast.distil).

    student, teacher: [d, K] float32 of unit columns; centre: [K] of the teacher's logits; student_temp, teacher_temp:
    temperatures; chunk: rows of a place whose logits are held at once.
    """

    student: jax.Array
    teacher: jax.Array
    centre: jax.Array
    student_temp: float
    teacher_temp: jax.Array
    chunk: int


class Totals(NamedTuple):
    """Sums over the rows of one granularity, scalars.

    ce: weighted cross-entropy (differentiable); entropy: of the teacher, weighted; weight: of the rows.
    """

    ce: jax.Array
    entropy: jax.Array
    weight: jax.Array


def distil_rows(row_sets: Sequence[Mapping[str, Rows]], prototypes: Prototypes) -> tuple[dict[str, Totals], jax.Array]:
    """Self-distillation of several sets of rows, with one call of the loss per set.

    Args:
        row_sets: the rows of a set have the same number of targets M. Keys of a set: a granularity, with anything after
            a "/" to tell two kinds of rows apart.
        prototypes: of the head that all these rows went through.

    Returns:
        {granularity: Totals over all sets}, and the summed assignment of the teacher [K].
    """
    zero = jnp.float32(0)
    totals = {name: Totals(zero, zero, zero) for name in NAMES}
    assigned = jnp.zeros(prototypes.centre.shape, jnp.float32)
    for row_set in row_sets:
        joined = Rows(*(jnp.concatenate(arrays, axis=1) for arrays in zip(*row_set.values(), strict=True)))
        ce, entropy, share = contrast.distil(
            *joined,
            prototypes.student,
            prototypes.teacher,
            prototypes.centre,
            prototypes.student_temp,
            prototypes.teacher_temp,
            prototypes.chunk,
        )
        assigned, start = assigned + share, 0
        for kind, of_kind in row_set.items():
            name, stop = kind.split("/")[0], start + of_kind.weight.shape[1]
            sums = Totals(ce[:, start:stop].sum(), entropy[:, start:stop].sum(), of_kind.weight.sum())
            totals[name] = jax.tree.map(jnp.add, totals[name], sums)
            start = stop
    return totals, assigned
