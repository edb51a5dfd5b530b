"""The SkySense objective: multi-granularity self-distillation per sensor and fused, plus cross-modal alignment.

L = alpha * L_MGCL + beta * L_align (SkySense paper; what it leaves open is a field of `config.objective`).

L_MGCL = sum over heads (each sensor, and "fused") of pixel + object + image. The student sees both global views and the local ones, the teacher (an
average of the student) the global ones; (student g0, teacher g1), (g1, g0) and every local with both globals are compared, as in DINO. Each
term is the mean cross-entropy -p log q over all valid pairs of the *global* batch, p = softmax((teacher - centre) / teacher_temp), q =
softmax(student / student_temp) over the head's prototypes. Padded dates, invalid cells and cells without common ground have weight 0; a sensor
that is absent from the whole batch gives exactly 0.
L_align = sum over pairs of sensors of the symmetric InfoNCE between time-averaged, projected features of the regions of the student's global views.

Metrics (float32 scalars; i = head: a sensor or "fused"). A collapse is seen at a glance:
  loss/total, loss/mgcl, loss/align     the sums above
  loss/<i>/<pixel|object|image>         one term. Uniform collapse: stays at log K with kl 0; collapse to one prototype: falls to 0 at once
  loss/align/<a>-<b>                    InfoNCE of two sensors; log(number of valid regions) = nothing learnt
  teacher/entropy/<i>                   mean entropy of p / log K. 1 = uniform collapse, 0 = each row on one prototype
  teacher/kl/<i>                        mean KL(p || q) in nats. 0 while the entropy is 1 = uniform collapse
  teacher/usage/<i>                     exp(entropy of the mean p) / K: share of prototypes in use. 1/K = collapse to one prototype
  teacher/centre/<i>                    norm of the centre / sqrt(K). Growing without end = the centring fights a collapse
  student/std/<i>                       std over views of the L2-normalised image features, x sqrt(width). 0 = constant features, 1 = isotropic
  views/overlap_global, views/overlap_local   share of a view's cells with a match in the (other) global view
  A head none of whose rows is valid in the batch reports 0 for its losses and 0 for teacher/*, student/std.
"""
from __future__ import annotations

import itertools
import math
from typing import Any, Mapping

import jax
import jax.numpy as jnp

from skysense_jax.core import flops as count
from skysense_jax.models.skysense import Model, make_model
from skysense_jax.nn.heads import DINOHead, unit_prototypes
from skysense_jax.objectives import granularity as gr
from skysense_jax.objectives.base import Objective
from skysense_jax.ops import clusters, contrast
from skysense_jax.ops.ema import ema

FUSED = "fused"
GLOBAL_VIEWS = 2

Tree = Any


def make_objective(cfg: Any, contract: Mapping[str, Any]) -> Objective:
    """The objective of a whole configuration and an input contract. See objectives.base for the functions' contracts.

    params = {"encoder", "heads": {i: DINO head}, "align": {sensor: {"kernel" [D, align_dim]}}}; teacher = {"encoder", "heads"};
    memory = {"centre": {i: [K]}}. Raises ValueError where the configuration contradicts itself.
    """
    model, o = make_model(cfg.model, contract), cfg.objective
    sensors = tuple(contract["sensors"])
    heads = (*sensors, FUSED)
    pairs = tuple(itertools.combinations(sensors, 2))
    dtype = jnp.dtype(cfg.model.dtype)
    head = DINOHead(o.head.hidden, o.head.bottleneck, o.head.prototypes, o.head.layers, dtype=dtype)
    widths = {**{name: cfg.model.width for name in sensors}, FUSED: cfg.model.fusion.embed_dims}
    size = int(cfg.data.global_size)
    if size % o.align_grid:
        raise ValueError(f"objective.align_grid={o.align_grid} does not divide data.global_size={size}")
    seeds = clusters.seed_cells(size, size, o.clusters)

    def init(rng: jax.Array, spec: Tree) -> tuple[Tree, Tree, Tree]:
        views = next(iter(spec["global"]["sensors"].values()))["image"].shape[1]
        if views != GLOBAL_VIEWS:
            raise ValueError(f"the batch has {views} global views, this objective pairs {GLOBAL_VIEWS}")
        place = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[2:]), leaf.dtype), dict(spec["global"]["sensors"]))
        encoder_key, head_key, align_key = jax.random.split(rng, 3)
        params = {
            "encoder": model.init(encoder_key, place),
            "heads": {
                name: head.init(jax.random.fold_in(head_key, i), jnp.zeros((1, widths[name])))["params"] for i, name in enumerate(heads)
            },
            "align": {
                name: {"kernel": jax.nn.initializers.lecun_normal()(jax.random.fold_in(align_key, i), (widths[name], o.align_dim))}
                for i, name in enumerate(sensors)
            },
        }
        teacher = jax.tree.map(jnp.copy, {"encoder": params["encoder"], "heads": params["heads"]})
        return params, teacher, {"centre": {name: jnp.zeros(o.head.prototypes, jnp.float32) for name in heads}}

    def encode(encoder: Tree, views: Tree, train: bool, rng: jax.Array | None) -> dict[str, gr.Cells]:
        """All views of a scope through the encoder at once (folded into the batch axis, places outer): {head: Cells}."""
        b, s, h, w = views["coords"].shape[:4]
        inputs = jax.tree.map(lambda x: x.reshape(b * s, *x.shape[2:]), dict(views["sensors"]))
        out = model.apply(encoder, inputs, train=train, rng=rng)
        maps = {**out["maps"], FUSED: out["fused"][:, None]}
        masks = {**out["mask"], FUSED: out["fused_mask"][:, None]}
        return {
            name: gr.Cells(maps[name].reshape(b, s, -1, h * w, widths[name]), masks[name].reshape(b, s, -1, h * w)) for name in heads
        }

    def through_head(params: Tree, *arrays: jax.Array) -> list[jax.Array]:
        """Arrays [B, ..., D] to normalised bottleneck vectors [B, ..., d], in one call of the head."""
        b, width = arrays[0].shape[0], arrays[0].shape[-1]
        flat = [x.reshape(b, -1, width) for x in arrays]
        out = head.apply({"params": params}, jnp.concatenate(flat, axis=1), bottleneck=True).astype(dtype)
        parts, start = [], 0
        for x, rows in zip(arrays, flat):
            parts.append(out[:, start:start + rows.shape[1]].reshape(*x.shape[:-1], -1))
            start += rows.shape[1]
        return parts

    def distil_head(
        student_head: Tree, teacher_head: Tree, centre: jax.Array, mine: gr.Cells, local: gr.Cells | None, theirs: gr.Cells,
        matches: Mapping[str, jax.Array], schedule: Mapping[str, jax.Array],
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array], dict[str, jax.Array]]:
        """The three terms of one head: (losses by granularity, metrics, what `settle` needs)."""
        assigned = gr.assignment(theirs, seeds, o.sinkhorn_eps, o.sinkhorn_iters)
        mine_image, their_image = gr.image_means(mine), gr.image_means(theirs)
        swap = lambda cells: gr.Cells(cells.features[:, ::-1], cells.mask[:, ::-1])  # g0 meets g1
        mine_object, their_object, object_weight = gr.objects(mine, swap(theirs), assigned[:, ::-1], matches["global"], every=False)
        student_in = [mine.features, mine_object, mine_image.features]
        teacher_in = [theirs.features, their_object, their_image.features]
        if local is not None:
            local_image = gr.image_means(local)
            local_object, their_local_object, local_weight = gr.objects(local, theirs, assigned, matches["local"], every=True)
            student_in += [local.features, local_object, local_image.features]
            teacher_in += [their_local_object]
        z = through_head(student_head, *student_in)
        t = [jax.lax.stop_gradient(x) for x in through_head(teacher_head, *teacher_in)]

        def fold(x: jax.Array) -> jax.Array:  # object rows: every pair of views is a view of its own
            return x.reshape(x.shape[0], -1, *x.shape[3:])

        def object_rows(vectors: jax.Array, targets: jax.Array, weight: jax.Array) -> gr.Rows:
            return gr.rows(fold(vectors), fold(targets)[:, :, None], fold(weight)[:, :, None])

        groups = [{
            "pixel": gr.rows(z[0], *gr.pixel_targets(mine, swap(theirs), t[0][:, ::-1], matches["global"], every=False)),
            "object": object_rows(z[1], t[1], object_weight),
            "image": gr.rows(z[2], *gr.image_targets(mine_image, swap(their_image), t[2][:, ::-1], every=False)),
        }]
        if local is not None:
            groups[0]["object/local"] = object_rows(z[4], t[3], local_weight)
            groups.append({
                "pixel": gr.rows(z[3], *gr.pixel_targets(local, theirs, t[0], matches["local"], every=True)),
                "image": gr.rows(z[5], *gr.image_targets(local_image, their_image, t[2], every=True)),
            })

        v = student_head["last_layer_v"]
        frozen = schedule["last_layer_frozen"]
        v = frozen * jax.lax.stop_gradient(v) + (1 - frozen) * v
        theirs_v = unit_prototypes(teacher_head["last_layer_v"])
        totals, usage = gr.distil_groups(
            groups, unit_prototypes(v).astype(dtype), theirs_v.astype(dtype), centre, o.student_temp, schedule["teacher_temp"], o.chunk)
        losses = {name: contrast.safe_mean(x.ce, x.weight) for name, x in totals.items()}

        # The mean of the teacher's logits is the last layer of the mean vector: no logits needed. The granularities count alike, as in the loss.
        weights = (theirs.mask, object_weight, their_image.mask)
        sums = [(jnp.sum(x * w[..., None], axis=tuple(range(w.ndim)), dtype=jnp.float32), jnp.sum(w)) for x, w in zip(t, weights)]
        present = sum((w > 0).astype(jnp.float32) for _, w in sums)
        mean = contrast.safe_mean(sum(contrast.safe_mean(total, w) for total, w in sums), present)
        settle_inputs = {"logits": jnp.dot(mean, theirs_v, precision="highest"), "seen": present}

        held = sum((x.weight > 0).astype(jnp.float32) for x in totals.values())
        entropy = contrast.safe_mean(sum(contrast.safe_mean(x.entropy, x.weight) for x in totals.values()), held)
        metrics = {
            "teacher/entropy": entropy / math.log(o.head.prototypes),
            "teacher/kl": contrast.safe_mean(sum(losses.values()), held) - entropy,
            "teacher/usage": prototype_usage(usage),
            "teacher/centre": jnp.sqrt(jnp.mean(centre**2)),
            "student/std": feature_std(mine_image),
        }
        return losses, metrics, settle_inputs

    def align(params: Tree, cells: Mapping[str, gr.Cells]) -> dict[str, jax.Array]:
        pooled = {name: pool_regions(cells[name], size, o.align_grid) for name in sensors}
        vectors = {
            name: contrast.normalise(jnp.dot(x.astype(dtype), params[name]["kernel"].astype(dtype), preferred_element_type=jnp.float32))
            for name, (x, _) in pooled.items()
        }
        return {
            f"{a}-{b}": contrast.info_nce(vectors[a], vectors[b], pooled[a][1] * pooled[b][1], o.align_temp) for a, b in pairs
        }

    def loss(
        params: Tree, teacher: Tree, memory: Tree, batch: Tree, keys: Mapping[str, jax.Array], schedule: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        teacher = jax.lax.stop_gradient(teacher)
        views, local_views = batch["global"], batch.get("local")
        rng = keys["drop_path"]
        mine = encode(params["encoder"], views, True, jax.random.fold_in(rng, 0))
        theirs = jax.lax.stop_gradient(encode(teacher["encoder"], views, False, None))
        coords, cell = views["coords"], views["cell"]
        matches = {"global": gr.overlap(coords, coords[:, ::-1], cell, cell[:, ::-1])}
        local: dict[str, gr.Cells] = {}
        if local_views is not None:
            local = encode(params["encoder"], local_views, True, jax.random.fold_in(rng, 1))
            matches["local"] = gr.overlap(
                local_views["coords"][:, :, None], coords[:, None], local_views["cell"][:, :, None], cell[:, None])

        metrics = {f"views/overlap_{scope}": match.sum(-1).mean() for scope, match in matches.items()}
        settle_inputs, mgcl = {}, jnp.float32(0)
        for name in heads:
            losses, monitors, settle_inputs[name] = distil_head(
                params["heads"][name], teacher["heads"][name], memory["centre"][name], mine[name], local.get(name), theirs[name],
                matches, schedule)
            mgcl = mgcl + sum(losses.values())
            metrics |= {f"loss/{name}/{kind}": value for kind, value in losses.items()}
            metrics |= {f"{key}/{name}": value for key, value in monitors.items()}
        aligned = align(params["align"], mine)
        metrics |= {f"loss/align/{pair}": value for pair, value in aligned.items()}
        alignment = sum(aligned.values(), start=jnp.float32(0))
        total = o.alpha * mgcl + o.beta * alignment
        metrics |= {"loss/total": total, "loss/mgcl": mgcl, "loss/align": alignment}
        return total, (jax.lax.stop_gradient(metrics), jax.lax.stop_gradient(settle_inputs))

    def settle(
        params: Tree, teacher: Tree, memory: Tree, settle_inputs: Tree, schedule: Mapping[str, jax.Array]
    ) -> tuple[Tree, Tree]:
        student = {"encoder": params["encoder"], "heads": params["heads"]}
        centre = {
            name: contrast.update_centre(memory["centre"][name], seen["logits"], seen["seen"], o.centre_momentum)
            for name, seen in settle_inputs.items()
        }
        return ema(teacher, student, schedule["teacher_momentum"]), {"centre": centre}

    def features(params: Tree, inputs: Tree) -> dict[str, jax.Array]:
        return encoder_features(model, params["encoder"], inputs)

    def model_flops(spec: Tree) -> float:
        return count.skysense_step(cfg, contract, spec)

    return Objective(init, loss, settle, features, sharding_rules(cfg, sensors), model_flops, ("drop_path",),
                     ("teacher_temp", "last_layer_frozen", "teacher_momentum"))


def encoder_features(model: Model, encoder: Tree, inputs: Tree) -> dict[str, jax.Array]:
    """Float32 features of a PlaceInput: "image" [B, E], "pixel" [B, h, w, E] and, for each sensor given, "<sensor>_image" [B, D],
    "<sensor>_pixel" [B, h, w, D]. Needs the model only, so that weights without a training configuration have them too."""
    out = model.apply(encoder, inputs)
    result = {"pixel": out["fused"], "image": time_mean(out["fused"][:, None], out["fused_mask"][:, None])[0]}
    for name in out["maps"]:
        result[f"{name}_image"], result[f"{name}_pixel"] = time_mean(out["maps"][name], out["mask"][name])
    return {name: value.astype(jnp.float32) for name, value in result.items()}


def time_mean(maps: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Masked means of [B, T, h, w, D], mask [B, T, h, w]: over cells and dates [B, D], and over dates [B, h, w, D] (0 where nothing is valid)."""
    total, mass = jnp.sum(maps * mask[..., None], axis=1, dtype=jnp.float32), mask.sum(1)
    pixel = total / jnp.maximum(mass, 1.0)[..., None]
    return total.sum((1, 2)) / jnp.maximum(mass.sum((1, 2)), 1.0)[..., None], pixel


def pool_regions(cells: gr.Cells, size: int, grid: int) -> tuple[jax.Array, jax.Array]:
    """Masked mean over the dates and the cells of each region of a grid x grid division of a size x size view.

    cells of S views -> (vectors [B, S * grid^2, D] float32, valid [B, S * grid^2] float32: 1 where any cell of any date is valid).
    """
    b, s, _, _, d = cells.features.shape
    side = size // grid
    total = jnp.sum(cells.features * cells.mask[..., None].astype(cells.features.dtype), axis=2, dtype=jnp.float32)
    total = total.reshape(b, s, grid, side, grid, side, d).sum((3, 5))
    mass = cells.mask.sum(2).reshape(b, s, grid, side, grid, side).sum((3, 5))
    mean = total / jnp.maximum(mass, 1.0)[..., None]
    return mean.reshape(b, -1, d), (mass > 0).astype(jnp.float32).reshape(b, -1)


def prototype_usage(assigned: jax.Array) -> jax.Array:
    """exp(entropy of the mean assignment) / K, from summed assignments [K]; 0 where nothing was assigned."""
    share = contrast.safe_mean(assigned, assigned.sum())
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.where(share > 0, share, 1.0)), 0.0))
    return jnp.where(assigned.sum() > 0, jnp.exp(entropy) / assigned.shape[-1], 0.0)


def feature_std(image: gr.Cells) -> jax.Array:
    """Std over the views of the batch of the L2-normalised, date-averaged image features, mean over channels, x sqrt(width)."""
    x = contrast.normalise(jnp.sum(image.features * image.mask[..., None], axis=(2, 3), dtype=jnp.float32))  # [B, S, D]
    weight = image.mask.max((2, 3))[..., None]  # [B, S, 1]
    mass = weight.sum()
    mean = contrast.safe_mean((x * weight).sum((0, 1)), mass)
    variance = contrast.safe_mean((jnp.square(x - mean) * weight).sum((0, 1)), mass)
    return jnp.sqrt(variance).mean() * math.sqrt(x.shape[-1])


def sharding_rules(cfg: Any, sensors: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Rules over the joined tree {"params", "teacher", "memory"}: one per family of modules (see core.sharding for the tactics)."""
    families = [*sensors, *(f"head_{name}" for name in sensors if name != "hr"), "fusion"]
    rules = [(f"(params|teacher)/encoder/{family}/.+", "fsdp") for family in families]
    if cfg.model.calendar != "none":
        rules.append(("(params|teacher)/encoder/ctpe", "fsdp"))
    rules += [(f"(params|teacher)/heads/{name}/.+", "fsdp") for name in (*sensors, FUSED)]
    return (*rules, ("params/align/[a-z0-9]+/kernel", "fsdp"), ("memory/centre/[a-z0-9]+", "replicate"))
