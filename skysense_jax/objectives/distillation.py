"""SkySense's self-distillation: the pixel, object and image terms of several heads at once (msGFM's is gfm.py).

What is computed, as loops; everything below is these loops as arrays (tests/test_skysense_loss_twin.py has them in
numpy):

    for head in heads, date in dates of its maps, place in the global batch:
        for t in global views of the teacher:
            share[m, c] = sinkhorn(cosine(cells of t, those of them that are seeds))     soft, balanced clusters
        for s in views of the student, t in global views of the teacher, but not the same view of both:
            for n in cells of s, m = the cell of t over the same ground:                 both valid, else skipped
                pixel  += CE(t[m], s[n])                                                 weight 1 / cells of s
            for c in clusters:                                                           over the same n and m
                object += CE(mean of t[m] by share[m, c], mean of s[n] by share[m, c])   weight min(sum share, 1) / C
            image += CE(mean of the valid cells of t, mean of the valid cells of s)      weight 1
    term = sum of weight * CE / sum of weight                                            by head and granularity
    mean logits = mean over granularities of teacher_head(cells, objects, images of t)   what the centre follows

    CE(y, x) = -sum over K of p * log q    p = softmax((teacher_head(y) - centre) / teacher_temp)
                                           q = softmax(student_head(x) / student_temp)

Views of the student: the two global ones, which meet the teacher's other one ("zipped", the teacher's views swapped),
and the local ones, which meet both ("crossed"). Heads over maps of one width (all sensors, and the fused map where it
is as wide) are a *head group*: their dates are laid side by side in one array, because matching, clustering and means
treat each date on its own; only the projection heads differ. The logits are never all held: cells become bottleneck
vectors first, and `contrast.distil` multiplies with the prototypes, chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from skysense_jax.core.sharding import gathered
from skysense_jax.core.trees import Tree
from skysense_jax.nn.heads import DINOHead, unit_prototypes
from skysense_jax.objectives import granularity, monitors
from skysense_jax.objectives.granularity import Cells, cross_views, zip_views
from skysense_jax.ops import contrast

Scalars = dict[str, jax.Array]


class Settings(NamedTuple):
    """What is fixed over a run.

    objective: config.objective; head: the module of every DINO head; seeds: [C] cells that the clusters of a global
    view start from.
    """

    objective: config_dict.ConfigDict
    head: DINOHead
    seeds: np.ndarray


class Heads(NamedTuple):
    """Weights by head. student, teacher: of the DINO heads; centre: [K] of the teacher's logits."""

    student: Mapping[str, Tree]
    teacher: Mapping[str, Tree]
    centre: Mapping[str, jax.Array]


class Views(NamedTuple):
    """Maps of a batch, by head, and which of their cells show the same ground.

    student, teacher: cells of the two global views; local: the student's cells of the local views, {} without. matches:
    {"global": [B, 2, N, N'] of each global view with the other, "local": [B, L, 2, N, N'], absent without}.
    """

    student: Mapping[str, Cells]
    local: Mapping[str, Cells]
    teacher: Mapping[str, Cells]
    matches: Mapping[str, jax.Array]


class HeadTerms(NamedTuple):
    """What one head adds to the loss, to the metrics and to its centre.

    losses: by granularity; monitors: see objectives.skysense; mean_logits: {"logits": the teacher's mean logits [K],
    "seen": > 0 where there were any}, what the centre is updated with.
    """

    losses: Scalars
    monitors: Scalars
    mean_logits: Scalars


def join(cells: Mapping[str, Cells], names: Sequence[str]) -> Cells:
    """Puts the dates of several heads' maps side by side.

    Args:
        cells: by head, maps [B, S, T, N, D].
        names: the heads, in order.

    Returns:
        Cells with features [B, S, sum of T, N, D].
    """
    return Cells(*(jnp.concatenate(leaves, axis=2) for leaves in zip(*(cells[name] for name in names), strict=True)))


def swap_views(tree: Tree) -> Tree:
    """Puts view 1 where view 0 was, and view 0 where view 1 was: leaves [B, 2, ...]."""
    return jax.tree.map(lambda x: x[:, ::-1], tree)


def through_heads(
    head: DINOHead, weights: Mapping[str, Tree], features: Mapping[str, jax.Array], spans: Mapping[str, slice]
) -> dict[str, jax.Array]:
    """Features of a head group to normalised bottleneck vectors, with one call per head.

    With head.remat the hidden layers are computed again in the backward pass: 2.6 GiB a chip less at full size.

    Args:
        head: the module all heads share.
        weights: by head.
        features: by kind of row, [B, S, T, n, D] with the dates of all heads side by side.
        spans: which of the dates belong to a head.

    Returns:
        By kind of row, [B, S, T, n, d].
    """

    def bottleneck(weights: Tree, x: jax.Array) -> jax.Array:
        vectors = cast(jax.Array, head.apply({"params": weights}, x, bottleneck=True))
        return vectors.astype(head.dtype)

    apply = jax.checkpoint(bottleneck) if head.remat else bottleneck
    vectors: dict[str, list[jax.Array]] = {kind: [] for kind in features}
    for name, span in spans.items():
        of_head = {kind: x[:, :, span] for kind, x in features.items()}
        flat = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in of_head.values()], axis=1)
        flat, start = apply(weights[name], flat), 0
        for kind, x in of_head.items():
            stop = start + math.prod(x.shape[1:-1])
            vectors[kind].append(flat[:, start:stop].reshape(*x.shape[:-1], -1))
            start = stop
    return {kind: jnp.concatenate(by_head, axis=2) for kind, by_head in vectors.items()}


def head_group_terms(
    names: Sequence[str], settings: Settings, heads: Heads, views: Views, schedule: Mapping[str, jax.Array]
) -> dict[str, HeadTerms]:
    """The terms of a head group.

    Args:
        names: the heads of the group, whose maps have one width.
        settings: of the objective.
        heads: the weights, of these heads at least.
        views: the maps, of these heads at least.
        schedule: "teacher_temp" and "last_layer_frozen" of this step.

    Returns:
        {head: HeadTerms}.
    """
    o = settings.objective
    dates = [views.student[name].mask.shape[2] for name in names]
    spans = {name: slice(sum(dates[:i]), sum(dates[: i + 1])) for i, name in enumerate(names)}
    student_cells, teacher_cells = join(views.student, names), join(views.teacher, names)

    # Features, by granularity: cells, means of clusters over common ground, means of images.
    assigned = granularity.assignment(teacher_cells, settings.seeds, o.sinkhorn_eps, o.sinkhorn_iters)
    swapped_cells = swap_views(teacher_cells)  # view 0 of the student meets view 1 of the teacher, and view 1 view 0
    student_images, teacher_images = granularity.image_means(student_cells), granularity.image_means(teacher_cells)
    swapped_images = swap_views(teacher_images)
    student_objects, teacher_objects, object_weight = granularity.objects(
        student_cells, swapped_cells, swap_views(assigned), views.matches["global"], zip_views
    )
    student_features = {"pixel": student_cells.features, "object": student_objects, "image": student_images.features}
    teacher_features = {"pixel": teacher_cells.features, "object": teacher_objects, "image": teacher_images.features}
    if views.local:
        local_cells = join(views.local, names)
        local_images = granularity.image_means(local_cells)
        local_objects, teacher_local_objects, local_object_weight = granularity.objects(
            local_cells, teacher_cells, assigned, views.matches["local"], cross_views
        )
        student_features |= {
            "pixel/local": local_cells.features,
            "object/local": local_objects,
            "image/local": local_images.features,
        }
        teacher_features |= {"object/local": teacher_local_objects}

    # Vectors: all features through the heads but for the last layer.
    student_vectors = through_heads(settings.head, heads.student, student_features, spans)
    teacher_vectors = jax.lax.stop_gradient(through_heads(settings.head, heads.teacher, teacher_features, spans))

    # Pairs: what each vector of the student is compared with, [B, S, M, T, n, d], and its weight, [B, S, M, T, n].
    targets = {
        "pixel": granularity.pixel_targets(
            student_cells, swapped_cells, swap_views(teacher_vectors["pixel"]), views.matches["global"], zip_views
        ),
        "object": (teacher_vectors["object"][:, :, None], object_weight[:, :, None]),
        "image": granularity.image_targets(
            student_images, swapped_images, swap_views(teacher_vectors["image"]), zip_views
        ),
    }
    row_kinds = [list(targets)]
    if views.local:
        targets |= {
            "object/local": (teacher_vectors["object/local"][:, :, None], local_object_weight[:, :, None]),
            "pixel/local": granularity.pixel_targets(
                local_cells, teacher_cells, teacher_vectors["pixel"], views.matches["local"], cross_views
            ),
            "image/local": granularity.image_targets(
                local_images, teacher_images, teacher_vectors["image"], cross_views
            ),
        }
        # A row of the first set has one target (M = 1), of the second two, the teacher's two global views.
        row_kinds = [[*row_kinds[0], "object/local"], ["pixel/local", "image/local"]]

    # Losses: cross-entropies of the rows of each head, with its own last layer.
    centre_weights = {"pixel": teacher_cells.mask, "object": object_weight, "image": teacher_images.mask}
    terms = {}
    for name, span in spans.items():
        row_sets = [
            {kind: granularity.rows(student_vectors[kind], *targets[kind], span) for kind in kinds}
            for kinds in row_kinds
        ]
        prototypes = last_layers(name, settings, heads, schedule)
        totals, usage = granularity.distil_rows(row_sets, prototypes)
        losses = {kind: contrast.safe_mean(x.ce, x.weight) for kind, x in totals.items()}
        head_monitors = {
            **monitors.teacher_monitors(totals, losses, usage, heads.centre[name]),
            "student/std": monitors.feature_std(student_images.features[:, :, span], student_images.mask[:, :, span]),
        }
        logits = mean_logits(
            {kind: teacher_vectors[kind][:, :, span] for kind in centre_weights},
            {kind: weight[:, :, span] for kind, weight in centre_weights.items()},
            prototypes.teacher,
        )
        terms[name] = HeadTerms(losses, head_monitors, logits)
    return terms


def last_layers(
    name: str, settings: Settings, heads: Heads, schedule: Mapping[str, jax.Array]
) -> granularity.Prototypes:
    """Normalises both networks' prototypes of one head; the student's have no gradient while `last_layer_frozen` is 1.

    Args:
        name: of the head.
        settings: of the objective.
        heads: the weights, of this head at least.
        schedule: "teacher_temp" and "last_layer_frozen" of this step.

    Returns:
        The prototypes with the centre, the temperatures and the chunk.
    """
    frozen, v = schedule["last_layer_frozen"], heads.student[name]["last_layer_v"]
    return granularity.Prototypes(
        gathered(unit_prototypes(frozen * jax.lax.stop_gradient(v) + (1 - frozen) * v)),
        gathered(unit_prototypes(heads.teacher[name]["last_layer_v"])),
        heads.centre[name],
        settings.objective.student_temp,
        schedule["teacher_temp"],
        settings.objective.chunk,
    )


def mean_logits(vectors: Mapping[str, jax.Array], weights: Mapping[str, jax.Array], prototypes: jax.Array) -> Scalars:
    """Mean of the teacher's logits over its rows, the granularities counting alike as they do in the loss.

    The last layer is linear, so it is the last layer of the mean vector: no logits are needed.

    Args:
        vectors: {granularity: [..., d]} of the teacher.
        weights: {granularity: [...]} of its rows.
        prototypes: [d, K] of the teacher.

    Returns:
        {"logits": [K], "seen": number of granularities with any row}.
    """
    axes = {kind: tuple(range(w.ndim)) for kind, w in weights.items()}
    sums = {
        kind: jnp.sum(x * weights[kind][..., None], axis=axes[kind], dtype=jnp.float32) for kind, x in vectors.items()
    }
    seen = contrast.add_up((w.sum() > 0).astype(jnp.float32) for w in weights.values())
    mean = contrast.safe_mean(
        contrast.add_up(contrast.safe_mean(sums[kind], w.sum()) for kind, w in weights.items()), seen
    )
    return {"logits": jnp.dot(mean, prototypes, precision="highest"), "seen": seen}
