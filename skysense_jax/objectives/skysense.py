"""The SkySense objective: multi-granularity self-distillation per sensor and fused, plus cross-modal alignment.

L = alpha * L_MGCL + beta * L_align (SkySense paper; what it leaves open is a field of `config.objective`).

L_MGCL = sum over heads (each sensor, and "fused") of pixel + object + image. The student sees both global views and the
local ones, the teacher (an average of the student) the global ones; (student g0, teacher g1), (g1, g0) and every local
with both globals are compared, as in DINO. Each term is the mean cross-entropy -p log q over all valid pairs of the
*global* batch, p = softmax((teacher - centre) / teacher_temp), q = softmax(student / student_temp) over the head's
prototypes. Padded dates, invalid cells and cells without common ground have weight 0; a sensor that is absent from the
whole batch gives exactly 0.
L_align = sum over pairs of sensors of the symmetric InfoNCE between time-averaged, projected features of the regions
of the student's global views.

Metrics (float32 scalars; i = head: a sensor or "fused"). A collapse is seen at a glance:
  loss/total, loss/mgcl, loss/align  the sums above
  loss/<i>/<pixel|object|image>      one term. Uniform collapse: stays at log K, kl 0; one prototype for all: drops to 0
  loss/align/<a>-<b>                 InfoNCE of two sensors; log(number of valid regions) = nothing learnt
  teacher/entropy/<i>                mean entropy of p / log K. 1 = uniform collapse, 0 = each row on one prototype
  teacher/kl/<i>                     mean KL(p || q) in nats. 0 while the entropy is 1 = uniform collapse
  teacher/usage/<i>                  exp(entropy of the mean p) / K, the share of prototypes in use. 1/K = one for all
  teacher/centre/<i>                 norm of the centre / sqrt(K). Growing without end = the centring fights a collapse
  student/std/<i>                    std over views of the L2-normalised image features, x sqrt(width).
                                     0 = constant features, 1 = isotropic
  views/overlap_<global|local>       share of a view's cells with a match in the (other) global view
  geo/located, geo/regions           places of the batch with a region; regions of the bank that were ever visited.
                                     Falling and 1: the bank is full, raise model.geo_context.regions or .cell
  geo/fit                            mean cosine of a cell and its nearest prototype. Rises as the bank learns
  geo/entropy                        entropy of the attention over prototypes / log P. 1 = the context is their mean
  geo/similarity                     mean cosine of two prototypes of a region. 1 = collapse: all learnt the same; lower
                                     sinkhorn_eps or prototype_momentum
  geo/directions                     over how many directions the prototypes of a region spread / their number. Falling:
                                     groups of them become the same, which their mean cosine need not show
  geo/dead                           share of prototypes that are (almost) never nearest. Rising: fewer prototypes
A head none of whose rows is valid in the batch reports 0 for all of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from skysense_jax.core import flops as count
from skysense_jax.core.rngs import name_hash
from skysense_jax.core.sharding import gathered
from skysense_jax.models.skysense import SENSOR_ORDER, SWIN, empty_bank, fused_width, make_model, with_bank
from skysense_jax.models.skysense_outputs import encoder_features
from skysense_jax.nn.heads import DINOHead
from skysense_jax.objectives import distillation, geo
from skysense_jax.objectives import granularity as gr
from skysense_jax.objectives.base import Objective
from skysense_jax.ops import clusters, contrast, prototypes
from skysense_jax.ops.ema import ema

FUSED = "fused"
GLOBAL_VIEWS = 2

Tree = Any


def make_objective(cfg: Any, contract: Mapping[str, Any]) -> Objective:
    """The objective of a whole configuration and an input contract. See objectives.base for the functions' contracts.

    params = {"encoder", "heads": {i: DINO head}, "align": {sensor: {"kernel" [D, align_dim]}}}; teacher = {"encoder",
    "heads"}; memory = {"centre": {i: [K]}}, with geo-context "bank" (ops.prototypes). Raises ValueError where the
    configuration contradicts itself.
    """
    model, o = make_model(cfg.model, contract), cfg.objective
    if cfg.model.get("modules"):
        raise ValueError("config.model.modules leaves modules out; pretraining needs the whole model")
    sensors = tuple(name for name in SENSOR_ORDER if name in contract["sensors"])  # one order: stable metric names
    heads = (*sensors, FUSED)
    pairs = tuple(itertools.combinations(sensors, 2))
    dtype = jnp.dtype(cfg.model.dtype)
    head = DINOHead(
        o.head.hidden, o.head.bottleneck, o.head.prototypes, o.head.layers, remat=cfg.model.remat, dtype=dtype
    )
    widths = {**{name: cfg.model.width for name in sensors}, FUSED: fused_width(cfg.model, contract)}
    has_bank = widths[FUSED] > cfg.model.fusion.embed_dims
    learns = has_bank and cfg.model.geo_context.bank == "on"
    families = [heads] if widths[FUSED] == cfg.model.width else [sensors, (FUSED,)]
    size = int(cfg.data.global_size)
    if size % o.align_grid:
        raise ValueError(f"objective.align_grid={o.align_grid} does not divide data.global_size={size}")
    if o.microbatches < 1 or int(cfg.data.batch) % o.microbatches:
        raise ValueError(f"objective.microbatches={o.microbatches} does not divide data.batch={cfg.data.batch}")
    if o.sinkhorn_eps <= 0 or has_bank and not 0 <= o.prototype_momentum < 1:
        raise ValueError(
            f"objective.sinkhorn_eps={o.sinkhorn_eps} must be above 0, objective.prototype_momentum="
            f"{o.get('prototype_momentum')} in 0..1 and below 1"
        )
    seeds = clusters.seed_cells(size, size, o.clusters)

    def init(rng: jax.Array, spec: Tree) -> tuple[Tree, Tree, Tree]:
        views = next(iter(spec["global"]["sensors"].values()))["image"].shape[1]
        if views != GLOBAL_VIEWS:
            raise ValueError(f"the batch has {views} global views, this objective pairs {GLOBAL_VIEWS}")
        place = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape[2:]), leaf.dtype), dict(spec["global"]["sensors"])
        )
        encoder_key, head_key, align_key = jax.random.split(rng, 3)
        params = {
            "encoder": model.init(encoder_key, place),
            "heads": {
                name: head.init(jax.random.fold_in(head_key, i), jnp.zeros((1, widths[name])))["params"]
                for i, name in enumerate(heads)
            },
            "align": {
                name: {
                    "kernel": jax.nn.initializers.lecun_normal()(
                        jax.random.fold_in(align_key, i), (widths[name], o.align_dim)
                    )
                }
                for i, name in enumerate(sensors)
            },
        }
        teacher = jax.tree.map(jnp.copy, {"encoder": params["encoder"], "heads": params["heads"]})
        memory = {"centre": {name: jnp.zeros(o.head.prototypes, jnp.float32) for name in heads}}
        if has_bank:
            memory["bank"] = empty_bank(cfg.model, jax.random.fold_in(rng, name_hash("bank")))
        return params, teacher, memory

    def encode(encoder: Tree, views: Tree, train: bool, rng: jax.Array | None) -> dict[str, gr.Cells]:
        """All views of a scope through the encoder at once, folded into the batch axis: {head: Cells}."""
        s, h, w = views["coords"].shape[1:4]

        def piece(places: Tree, rng: jax.Array | None) -> dict[str, gr.Cells]:
            inputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), places)
            out = model.apply(encoder, inputs, train=train, rng=rng)
            maps = {**out["maps"], FUSED: out["fused"][:, None]}
            masks = {**out["mask"], FUSED: out["fused_mask"][:, None]}
            return {
                name: gr.Cells(
                    maps[name].reshape(-1, s, *maps[name].shape[1:2], h * w, widths[name]),
                    masks[name].reshape(-1, s, *masks[name].shape[1:2], h * w),
                )
                for name in heads
            }

        return in_pieces(piece, o.microbatches, dict(views["sensors"]), rng)

    def align(params: Tree, cells: Mapping[str, gr.Cells]) -> dict[str, jax.Array]:
        pooled = {name: pool_regions(cells[name], size, o.align_grid) for name in sensors}
        vectors = {
            name: contrast.normalise(
                jnp.dot(
                    x.astype(dtype), gathered(params[name]["kernel"].astype(dtype)), preferred_element_type=jnp.float32
                )
            )
            for name, (x, _) in pooled.items()
        }
        return {
            f"{a}-{b}": contrast.info_nce(vectors[a], vectors[b], pooled[a][1] * pooled[b][1], o.align_temp)
            for a, b in pairs
        }

    def loss(
        params: Tree,
        teacher: Tree,
        memory: Tree,
        batch: Tree,
        keys: Mapping[str, jax.Array],
        schedule: Mapping[str, jax.Array],
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
        teacher = jax.lax.stop_gradient(teacher)
        views, local_views = batch["global"], batch.get("local")
        student_encoder, teacher_encoder = params["encoder"], teacher["encoder"]
        if has_bank:
            student_encoder, teacher_encoder = (
                with_bank(encoder, memory["bank"]) for encoder in (student_encoder, teacher_encoder)
            )
            views, local_views = (scope and geo.located(scope, batch["place"]) for scope in (views, local_views))
        rng = keys["drop_path"]
        mine = encode(student_encoder, views, True, jax.random.fold_in(rng, 0))
        theirs = jax.lax.stop_gradient(encode(teacher_encoder, views, False, None))
        coords, cell = views["coords"], views["cell"]
        matches = {"global": gr.overlap(coords, coords[:, ::-1], cell, cell[:, ::-1])}
        local: dict[str, gr.Cells] = {}
        if local_views is not None:
            local = encode(student_encoder, local_views, True, jax.random.fold_in(rng, 1))
            matches["local"] = gr.overlap(
                local_views["coords"][:, :, None], coords[:, None], local_views["cell"][:, :, None], cell[:, None]
            )

        metrics = {f"views/overlap_{scope}": match.sum(-1).mean() for scope, match in matches.items()}
        terms = {}
        for family in families:
            terms |= distillation.family_terms(
                family,
                o,
                head,
                seeds,
                params["heads"],
                teacher["heads"],
                memory["centre"],
                mine,
                local,
                theirs,
                matches,
                schedule,
            )
        mgcl, settle_inputs = jnp.float32(0), {}
        for name, (losses, monitors, settle_inputs[name]) in terms.items():
            mgcl = mgcl + sum(losses.values())
            metrics |= {f"loss/{name}/{kind}": value for kind, value in losses.items()}
            metrics |= {f"{key}/{name}": value for key, value in monitors.items()}
        if has_bank:
            settle_inputs["bank"], monitors = geo.observe(
                cfg, model, params["encoder"], memory["bank"], batch["place"], mine[FUSED]
            )
            metrics |= monitors
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
        centre = {}
        for name in heads:
            logits, seen = settle_inputs[name]["logits"], settle_inputs[name]["seen"]
            centre[name] = contrast.update_centre(memory["centre"][name], logits, seen, o.centre_momentum)
        memory = {**memory, "centre": centre}
        if learns:
            memory["bank"] = prototypes.update(memory["bank"], settle_inputs["bank"], o.prototype_momentum)
        return ema(teacher, student, schedule["teacher_momentum"]), memory

    def features(params: Tree, inputs: Tree) -> dict[str, jax.Array]:
        return encoder_features(model, params["encoder"], inputs)

    def model_flops(spec: Tree) -> float:
        return count.skysense_step(cfg, contract, spec)

    return Objective(
        init,
        loss,
        settle,
        features,
        sharding_rules(cfg, sensors) + (geo.rules(cfg.model) if has_bank else ()),
        model_flops,
        ("drop_path",),
        ("teacher_temp", "last_layer_frozen", "teacher_momentum"),
    )


def in_pieces(function: Callable[..., Tree], pieces: int, places: Tree, rng: jax.Array | None) -> Tree:
    """function(places, rng) one part of the places after the other, and the results together again, in order.

    places: leaves [B, ...], results: leaves [B, ...]. Only what the backward pass keeps is held for all B at once; the
    losses behind see all places together, so that the gradient is that of the whole batch. Place i goes to part
    i mod `pieces`: with a batch split over devices every device has its share of each part.
    """
    if pieces == 1:
        return function(places, rng)

    def split(x: jax.Array) -> jax.Array:
        return jnp.swapaxes(x.reshape(-1, pieces, *x.shape[1:]), 0, 1)

    def one(part: tuple[Tree, jax.Array]) -> Tree:
        some, number = part
        return function(some, None if rng is None else jax.random.fold_in(rng, number))

    out = jax.lax.map(one, (jax.tree.map(split, places), jnp.arange(pieces)))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), out)


def pool_regions(cells: gr.Cells, size: int, grid: int) -> tuple[jax.Array, jax.Array]:
    """Masked mean over the dates and the cells of each region of a grid x grid division of a size x size view.

    cells of S views -> (vectors [B, S * grid^2, D] float32, valid [B, S * grid^2] float32: 1 where any cell of any date
    is valid).
    """
    b, s, _, _, d = cells.features.shape
    side = size // grid
    total = jnp.sum(cells.features * cells.mask[..., None].astype(cells.features.dtype), axis=2, dtype=jnp.float32)
    total = total.reshape(b, s, grid, side, grid, side, d).sum((3, 5))
    mass = cells.mask.sum(2).reshape(b, s, grid, side, grid, side).sum((3, 5))
    mean = total / jnp.maximum(mass, 1.0)[..., None]
    return mean.reshape(b, -1, d), (mass > 0).astype(jnp.float32).reshape(b, -1)


def sharding_rules(cfg: Any, sensors: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Rules over the joined tree {"params", "teacher", "memory"}: one per family of modules (see core.sharding for the
    tactics).
    """
    families = [*sensors, *(f"head_{name}" for name in sensors if name != SWIN), "fusion"]
    rules = [(f"(params|teacher)/encoder/{family}/.+", "fsdp") for family in families]
    if cfg.model.calendar != "none":
        rules.append(("(params|teacher)/encoder/ctpe", "fsdp"))
    rules += [(f"(params|teacher)/heads/{name}/.+", "fsdp") for name in (*sensors, FUSED)]
    return (*rules, ("params/align/[a-z0-9]+/kernel", "fsdp"), ("memory/centre/[a-z0-9]+", "replicate"))
