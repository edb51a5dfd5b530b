"""The pixel, object and image terms of several heads at once, with the monitors that show a collapse.

Heads over maps of one width (all sensors, and the fused map where it is as wide) are a *family*: their dates are laid
side by side, because matching, clustering and means treat each date on its own; only the projection heads differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skysense_jax.core.sharding import gathered
from skysense_jax.nn.heads import DINOHead, unit_prototypes
from skysense_jax.objectives import granularity as gr
from skysense_jax.ops import contrast

Tree = Any
Scalars = dict[str, jax.Array]


def join(cells: Mapping[str, gr.Cells], names: Sequence[str]) -> gr.Cells:
    """The dates of several heads' maps side by side: [B, S, sum of T, N, D]."""
    return gr.Cells(*(jnp.concatenate(part, axis=2) for part in zip(*(cells[name] for name in names))))


def through_heads(
    head: DINOHead, params: Mapping[str, Tree], arrays: Mapping[str, jax.Array], spans: Mapping[str, slice]
) -> dict[str, jax.Array]:
    """Features [B, S, T, n, D] of a family to normalised bottleneck vectors [B, S, T, n, d], one call per head.

    With head.remat the hidden layers are computed again in the backward pass: 2.6 GiB a chip less at full size.
    """

    def bottleneck(weights: Tree, x: jax.Array) -> jax.Array:
        return head.apply({"params": weights}, x, bottleneck=True).astype(head.dtype)

    through = jax.checkpoint(bottleneck) if head.remat else bottleneck
    pieces: dict[str, list[jax.Array]] = {kind: [] for kind in arrays}
    for name, span in spans.items():
        mine = {kind: x[:, :, span] for kind, x in arrays.items()}
        flat = jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in mine.values()], axis=1)
        vectors, start = through(params[name], flat), 0
        for kind, x in mine.items():
            stop = start + math.prod(x.shape[1:-1])
            pieces[kind].append(vectors[:, start:stop].reshape(*x.shape[:-1], -1))
            start = stop
    return {kind: jnp.concatenate(parts, axis=2) for kind, parts in pieces.items()}


def family_terms(
    names: Sequence[str],
    o: Any,
    head: DINOHead,
    seeds: np.ndarray,
    student_heads: Mapping[str, Tree],
    teacher_heads: Mapping[str, Tree],
    centre: Mapping[str, jax.Array],
    student: Mapping[str, gr.Cells],
    local: Mapping[str, gr.Cells],
    teacher: Mapping[str, gr.Cells],
    matches: Mapping[str, jax.Array],
    schedule: Scalars,
) -> dict[str, tuple[Scalars, Scalars, Scalars]]:
    """Terms of a family of heads. o: config.objective. student, teacher: cells of the two global views by head; local:
    of the local
    views, {} without. matches: {"global": [B, 2, N, N'] of each global view with the other, "local": [B, L, 2, N, N']}.

    Returns {head: (losses by granularity, monitors, {"logits": mean teacher logits [K], "seen": > 0 where there were
    any})}.
    """
    dates = [student[name].mask.shape[2] for name in names]
    spans = {name: slice(sum(dates[:i]), sum(dates[: i + 1])) for i, name in enumerate(names)}
    mine, theirs = join(student, names), join(teacher, names)
    assigned = gr.assignment(theirs, seeds, o.sinkhorn_eps, o.sinkhorn_iters)
    facing = gr.Cells(
        theirs.features[:, ::-1], theirs.mask[:, ::-1]
    )  # view 0 of the student meets view 1 of the teacher
    mine_image, their_image = gr.image_means(mine), gr.image_means(theirs)
    facing_image = gr.Cells(their_image.features[:, ::-1], their_image.mask[:, ::-1])
    mine_object, their_object, object_weight = gr.objects(
        mine, facing, assigned[:, ::-1], matches["global"], every=False
    )

    student_in = {"pixel": mine.features, "object": mine_object, "image": mine_image.features}
    teacher_in = {"pixel": theirs.features, "object": their_object, "image": their_image.features}
    if local:
        near = join(local, names)
        near_image = gr.image_means(near)
        near_object, their_near_object, near_weight = gr.objects(near, theirs, assigned, matches["local"], every=True)
        student_in |= {"pixel/local": near.features, "object/local": near_object, "image/local": near_image.features}
        teacher_in |= {"object/local": their_near_object}
    z = through_heads(head, student_heads, student_in, spans)
    t = jax.lax.stop_gradient(through_heads(head, teacher_heads, teacher_in, spans))

    pairs = {
        "pixel": gr.pixel_targets(mine, facing, t["pixel"][:, ::-1], matches["global"], every=False),
        "object": (t["object"][:, :, None], object_weight[:, :, None]),
        "image": gr.image_targets(mine_image, facing_image, t["image"][:, ::-1], every=False),
    }
    kinds = [list(pairs)]
    if local:
        pairs |= {
            "object/local": (t["object/local"][:, :, None], near_weight[:, :, None]),
            "pixel/local": gr.pixel_targets(near, theirs, t["pixel"], matches["local"], every=True),
            "image/local": gr.image_targets(near_image, their_image, t["image"], every=True),
        }
        kinds = [[*kinds[0], "object/local"], ["pixel/local", "image/local"]]  # one target per row, two targets per row

    results = {}
    for name, span in spans.items():
        groups = [{kind: gr.rows(z[kind], *pairs[kind], span) for kind in group} for group in kinds]
        frozen, v = schedule["last_layer_frozen"], student_heads[name]["last_layer_v"]
        mine_v = gathered(unit_prototypes(frozen * jax.lax.stop_gradient(v) + (1 - frozen) * v))
        their_v = gathered(unit_prototypes(teacher_heads[name]["last_layer_v"]))
        totals, usage = gr.distil_groups(
            groups, mine_v, their_v, centre[name], o.student_temp, schedule["teacher_temp"], o.chunk
        )
        weights = {"pixel": theirs.mask, "object": object_weight, "image": their_image.mask}
        losses = {kind: contrast.safe_mean(x.ce, x.weight) for kind, x in totals.items()}
        monitors = {
            **teacher_monitors(totals, losses, usage, centre[name]),
            "student/std": feature_std(mine_image.features[:, :, span], mine_image.mask[:, :, span]),
        }
        results[name] = (
            losses,
            monitors,
            mean_logits(
                {kind: t[kind][:, :, span] for kind in weights},
                {kind: w[:, :, span] for kind, w in weights.items()},
                their_v,
            ),
        )
    return results


def mean_logits(vectors: Mapping[str, jax.Array], weights: Mapping[str, jax.Array], prototypes: jax.Array) -> Scalars:
    """Mean of the teacher's logits over its rows, the granularities counting alike as they do in the loss.

    The last layer is linear, so it is the last layer of the mean vector: no logits are needed. vectors [..., d],
    weights [...], prototypes [d, K]. Returns {"logits": [K], "seen": number of granularities with any row}.
    """
    axes = {kind: tuple(range(w.ndim)) for kind, w in weights.items()}
    sums = {
        kind: jnp.sum(x * weights[kind][..., None], axis=axes[kind], dtype=jnp.float32) for kind, x in vectors.items()
    }
    seen = sum((w.sum() > 0).astype(jnp.float32) for w in weights.values())
    mean = contrast.safe_mean(sum(contrast.safe_mean(sums[kind], w.sum()) for kind, w in weights.items()), seen)
    return {"logits": jnp.dot(mean, prototypes, precision="highest"), "seen": seen}


def teacher_monitors(totals: Mapping[str, gr.Totals], losses: Scalars, usage: jax.Array, centre: jax.Array) -> Scalars:
    """Means over the granularities that have rows; see objectives.skysense for the meaning of each."""
    held = sum((x.weight > 0).astype(jnp.float32) for x in totals.values())
    entropy = contrast.safe_mean(sum(contrast.safe_mean(x.entropy, x.weight) for x in totals.values()), held)
    return {
        "teacher/entropy": entropy / math.log(centre.shape[-1]),
        "teacher/kl": contrast.safe_mean(sum(losses.values()), held) - entropy,
        "teacher/usage": prototype_usage(usage),
        "teacher/centre": jnp.sqrt(jnp.mean(centre**2)),
    }


def prototype_usage(assigned: jax.Array) -> jax.Array:
    """exp(entropy of the mean assignment) / K, from summed assignments [K]; 0 where nothing was assigned."""
    share = contrast.safe_mean(assigned, assigned.sum())
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
    return jnp.where(assigned.sum() > 0, jnp.exp(entropy) / assigned.shape[-1], 0.0)


def feature_std(features: jax.Array, mask: jax.Array) -> jax.Array:
    """Std over the views of the batch of L2-normalised, date-averaged image features, mean over channels, x
    sqrt(width).

    features: [B, S, T, 1, D]; mask: [B, S, T, 1].
    """
    features, mask = jax.lax.stop_gradient((features, mask))
    x = contrast.normalise(jnp.sum(features * mask[..., None], axis=(2, 3), dtype=jnp.float32))  # [B, S, D]
    weight = mask.max((2, 3))[..., None]  # [B, S, 1]
    mass = weight.sum()
    mean = contrast.safe_mean((x * weight).sum((0, 1)), mass)
    variance = contrast.safe_mean((jnp.square(x - mean) * weight).sum((0, 1)), mass)
    return jnp.sqrt(variance).mean() * math.sqrt(x.shape[-1])
