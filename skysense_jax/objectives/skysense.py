"""The SkySense objective: multi-granularity self-distillation per sensor and fused, plus cross-modal alignment.

    g0, g1, locals = batch                              views of every place: crops of all its sensors at once
    student cells  = student.encode(g0, g1, locals)     {map: [view, date, cell]}; maps: one per sensor, and "fused"
    teacher cells  = teacher.encode(g0, g1)             the teacher is the student's moving average; no gradient
    match(s, t)    = for each cell of view s the one nearest cell of view t, if the two centres are at most half the
                     larger cell's diagonal apart

    for map in maps, each with a DINO head of its own:                                       L_MGCL
        for s, t in (g0, g1), (g1, g0), every local with g0 and g1:       view s of the student, view t of the teacher
            pixel  : CE(cell of t, cell of s)                             every matched pair of cells
            object : CE(mean of t, mean of s) over the matched cells of a cluster; clusters = Sinkhorn of the cells of t
            image  : CE(mean of all cells of t, mean of all cells of s)
        L_MGCL += weighted mean of pixel + of object + of image       a sum over maps, weights in distillation
    for a, b in pairs of sensors:                                                            L_align
        L_align += symmetric InfoNCE(regions of a, regions of b)          objectives.alignment; student, g0 and g1
    L = alpha * L_MGCL + beta * L_align

    CE = -sum over K of p * log q                       K prototypes: the columns of the DINO head's last layer
                                                        p = softmax((teacher's logits - centre) / teacher_temp)
                                                        q = softmax(student's logits / student_temp)
    settle, after the update:
        teacher = teacher_momentum * teacher + (1 - teacher_momentum) * student
        centre  = centre_momentum * centre + (1 - centre_momentum) * mean of the teacher's logits

From the SkySense paper. What it leaves open is a field of `config.objective` or `config.schedule` where it is a number,
and is said in the called files where it is a rule; the pairs of views are DINO's. tests/test_skysense_loss_twin.py is
this loss in numpy loops.

Every view draws its own dates: the k-th date of one view is compared with the k-th of the other, both in time order,
and the two may be different acquisitions. Local views give smaller maps, which are encoded apart. Every mean is over
all valid pairs of the *global* batch. Padded dates, invalid cells and cells without common ground have weight 0; a
sensor that is absent from the whole batch gives exactly 0.

With geo-context (model.geo_context) the model looks up the prototypes of the place's region in a bank and appends an
attention over them to the fused map. These prototypes are not DINO's: they learn without a gradient (objectives.geo),
by objective.prototype_momentum.

Metrics (float32 scalars; i = map: a sensor or "fused"). A collapse is seen at a glance:
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
A head none of whose rows is valid in the batch reports 0 for all of its metrics.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from skysense_jax.core.rngs import name_hash
from skysense_jax.core.trees import Tree
from skysense_jax.models.skysense import SENSOR_ORDER, SWIN, Model, empty_bank, fused_width, make_model, with_bank
from skysense_jax.nn.heads import DINOHead
from skysense_jax.objectives import alignment, distillation, flops, geo, granularity
from skysense_jax.objectives.base import Objective
from skysense_jax.objectives.granularity import Cells
from skysense_jax.objectives.microbatches import in_parts
from skysense_jax.ops import clusters, contrast, prototypes
from skysense_jax.ops.ema import ema
from skysense_jax.sensors import Contract

FUSED = "fused"
GLOBAL_VIEWS = 2


class Settings(NamedTuple):
    """What is fixed over a run.

    cfg: the whole configuration; model: its functions; sensors: in one order, so that metric names are stable; widths:
    channels of each head's map; head_groups: the heads, those over maps of one width together; distil: what the terms
    of the heads need; has_bank: whether the model has geo-context.
    """

    cfg: config_dict.ConfigDict
    model: Model
    sensors: tuple[str, ...]
    widths: Mapping[str, int]
    head_groups: tuple[tuple[str, ...], ...]
    distil: distillation.Settings
    has_bank: bool

    @property
    def heads(self) -> tuple[str, ...]:
        """The sensors, and "fused"."""
        return (*self.sensors, FUSED)


def make_objective(cfg: config_dict.ConfigDict, contract: Contract) -> Objective:
    """The objective of a whole configuration and an input contract. See objectives.base for the functions' contracts.

    params = {"encoder", "heads": {i: DINO head}, "align": {sensor: {"kernel" [D, align_dim]}}}; teacher = {"encoder",
    "heads"}; memory = {"centre": {i: [K]}}, with geo-context "bank" (ops.prototypes).

    Args:
        cfg: the whole configuration.
        contract: of the inputs (sensors.input_contract).

    Returns:
        The objective.

    Raises:
        ValueError: the configuration contradicts itself.
    """
    settings = make_settings(cfg, contract)
    return Objective(
        functools.partial(init, settings),
        functools.partial(loss, settings),
        functools.partial(settle, settings),
        sharding_rules(cfg, settings.sensors) + (geo.rules(cfg.model) if settings.has_bank else ()),
        functools.partial(flops.skysense_step, cfg, contract),
        ("drop_path",),
        ("teacher_temp", "last_layer_frozen", "teacher_momentum"),
    )


def make_settings(cfg: config_dict.ConfigDict, contract: Contract) -> Settings:
    """The settings of a configuration and an input contract.

    Args:
        cfg: the whole configuration.
        contract: the input contract.

    Returns:
        The settings.

    Raises:
        ValueError: configuration and contract contradict each other, or the configuration itself.
    """
    model, o = make_model(cfg.model, contract), cfg.objective
    if cfg.model.get("modules"):
        raise ValueError("config.model.modules leaves modules out; pretraining needs the whole model")
    sensors = tuple(name for name in SENSOR_ORDER if name in contract["sensors"])
    dtype = jnp.dtype(cfg.model.dtype)
    head = DINOHead(
        o.head.hidden, o.head.bottleneck, o.head.prototypes, o.head.layers, remat=cfg.model.remat, dtype=dtype
    )
    widths = {**{name: cfg.model.width for name in sensors}, FUSED: fused_width(cfg.model, contract)}
    has_bank = widths[FUSED] > cfg.model.fusion.embed_dims
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
    same_width = widths[FUSED] == cfg.model.width
    return Settings(
        cfg=cfg,
        model=model,
        sensors=sensors,
        widths=widths,
        head_groups=((*sensors, FUSED),) if same_width else (sensors, (FUSED,)),
        distil=distillation.Settings(o, head, clusters.seed_cells(size, size, o.clusters)),
        has_bank=has_bank,
    )


def init(settings: Settings, rng: jax.Array, spec: Tree) -> tuple[Tree, Tree, Tree]:
    """Initialises params, teacher and memory; see objectives.base.

    Args:
        settings: of the objective.
        rng: key of everything that is drawn.
        spec: the nested dict of the training batch, with leaves that have a shape and a dtype.

    Returns:
        params, teacher, memory.

    Raises:
        ValueError: the batch does not have two global views.
    """
    model, head, o = settings.model, settings.distil.head, settings.cfg.objective
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
            name: head.init(jax.random.fold_in(head_key, i), jnp.zeros((1, settings.widths[name])))["params"]
            for i, name in enumerate(settings.heads)
        },
        "align": {
            name: {
                "kernel": jax.nn.initializers.lecun_normal()(
                    jax.random.fold_in(align_key, i), (settings.widths[name], o.align_dim)
                )
            }
            for i, name in enumerate(settings.sensors)
        },
    }
    teacher = jax.tree.map(jnp.copy, {"encoder": params["encoder"], "heads": params["heads"]})
    memory = {"centre": {name: jnp.zeros(o.head.prototypes, jnp.float32) for name in settings.heads}}
    if settings.has_bank:
        memory["bank"] = empty_bank(settings.cfg.model, jax.random.fold_in(rng, name_hash("bank")))
    return params, teacher, memory


def loss(
    settings: Settings,
    params: Tree,
    teacher: Tree,
    memory: Tree,
    batch: Tree,
    keys: Mapping[str, jax.Array],
    schedule: Mapping[str, jax.Array],
) -> tuple[jax.Array, tuple[dict[str, jax.Array], Tree]]:
    """The loss of a batch, with its metrics and what `settle` needs; see objectives.base.

    Args:
        settings: of the objective.
        params: of the student, {"encoder", "heads", "align"}.
        teacher: {"encoder", "heads"}.
        memory: {"centre"}, with geo-context "bank".
        batch: the global batch, as :func:`encode_views` takes it.
        keys: "drop_path" of this step.
        schedule: "teacher_temp" and "last_layer_frozen" of this step.

    Returns:
        The loss, differentiable in params, and (metrics, settle_inputs) without a gradient: settle_inputs[head] as
        `distillation.mean_logits` returns it, settle_inputs["bank"] where there is one.
    """
    cfg, o = settings.cfg, settings.cfg.objective
    teacher = jax.lax.stop_gradient(teacher)
    views = encode_views(settings, params, teacher, memory, batch, keys["drop_path"])
    metrics = {f"views/overlap_{scope}": match.sum(-1).mean() for scope, match in views.matches.items()}

    heads = distillation.Heads(params["heads"], teacher["heads"], memory["centre"])
    terms: dict[str, distillation.HeadTerms] = {}
    for names in settings.head_groups:
        terms |= distillation.head_group_terms(names, settings.distil, heads, views, schedule)
    mgcl, settle_inputs = jnp.float32(0), dict[str, Tree]()
    for name, term in terms.items():
        mgcl = mgcl + contrast.add_up(term.losses.values())
        settle_inputs[name] = term.mean_logits
        metrics |= {f"loss/{name}/{kind}": value for kind, value in term.losses.items()}
        metrics |= {f"{key}/{name}": value for key, value in term.monitors.items()}

    if settings.has_bank:
        settle_inputs["bank"], monitors = geo.observe(
            cfg, settings.model, params["encoder"], memory["bank"], batch["place"], views.student[FUSED]
        )
        metrics |= monitors

    sensor_cells = {name: views.student[name] for name in settings.sensors}
    aligned = alignment.alignment_losses(
        params["align"], sensor_cells, int(cfg.data.global_size), jnp.dtype(cfg.model.dtype), o
    )
    metrics |= {f"loss/align/{pair}": value for pair, value in aligned.items()}
    align = contrast.add_up(aligned.values())
    total = o.alpha * mgcl + o.beta * align
    metrics |= {"loss/total": total, "loss/mgcl": mgcl, "loss/align": align}
    return total, (jax.lax.stop_gradient(metrics), jax.lax.stop_gradient(settle_inputs))


def settle(
    settings: Settings,
    params: Tree,
    teacher: Tree,
    memory: Tree,
    settle_inputs: Tree,
    schedule: Mapping[str, jax.Array],
) -> tuple[Tree, Tree]:
    """Teacher and memory after an update: the average, the centres and the bank go on; see objectives.base.

    Args:
        settings: of the objective.
        params: of the student, updated.
        teacher: before the update.
        memory: before the update.
        settle_inputs: of this step's `loss`.
        schedule: "teacher_momentum" of this step.

    Returns:
        teacher, memory.
    """
    cfg, o = settings.cfg, settings.cfg.objective
    student = {"encoder": params["encoder"], "heads": params["heads"]}
    centre = {}
    for name in settings.heads:
        logits, seen = settle_inputs[name]["logits"], settle_inputs[name]["seen"]
        centre[name] = contrast.update_centre(memory["centre"][name], logits, seen, o.centre_momentum)
    memory = {**memory, "centre": centre}
    if settings.has_bank and cfg.model.geo_context.bank == "on":
        memory["bank"] = prototypes.update(memory["bank"], settle_inputs["bank"], o.prototype_momentum)
    return ema(teacher, student, schedule["teacher_momentum"]), memory


def encode_views(
    settings: Settings, params: Tree, teacher: Tree, memory: Tree, batch: Tree, rng: jax.Array
) -> distillation.Views:
    """Maps of the student and the teacher, and where they show the same ground.

    Args:
        settings: of the objective.
        params: of the student.
        teacher: of the teacher, without gradient.
        memory: with geo-context, "bank" is what both networks ask.
        batch: {"global": views}, with "local" where there are local views, with "place" where there is a bank.
        rng: of the student's stochastic depth.

    Returns:
        The maps of the global and the local views, and their matches.
    """
    global_views, local_views = batch["global"], batch.get("local")
    student_encoder, teacher_encoder = params["encoder"], teacher["encoder"]
    if settings.has_bank:
        student_encoder = with_bank(student_encoder, memory["bank"])
        teacher_encoder = with_bank(teacher_encoder, memory["bank"])
        global_views = geo.located(global_views, batch["place"])
        if local_views is not None:
            local_views = geo.located(local_views, batch["place"])

    student_cells = encode(settings, student_encoder, global_views, jax.random.fold_in(rng, 0))
    teacher_cells = jax.lax.stop_gradient(encode(settings, teacher_encoder, global_views, None))
    coords, cell = global_views["coords"], global_views["cell"]
    matches = {"global": granularity.overlap(coords, coords[:, ::-1], cell, cell[:, ::-1])}
    local_cells: dict[str, Cells] = {}
    if local_views is not None:
        local_cells = encode(settings, student_encoder, local_views, jax.random.fold_in(rng, 1))
        matches["local"] = granularity.overlap(
            local_views["coords"][:, :, None], coords[:, None], local_views["cell"][:, :, None], cell[:, None]
        )
    return distillation.Views(student_cells, local_cells, teacher_cells, matches)


def encode(settings: Settings, encoder: Tree, views: Tree, rng: jax.Array | None) -> dict[str, Cells]:
    """All views of a scope through the encoder at once, folded into the batch axis.

    Args:
        settings: of the objective.
        encoder: its parameters.
        views: of all sensors, {"sensors", "coords", "cell"} with leaves [B, S, ...].
        rng: of stochastic depth, as the student trains; None: without, as the teacher sees.

    Returns:
        {head: Cells [B, S, T, N, D]}, "fused" with T = 1.
    """
    s, h, w = views["coords"].shape[1:4]

    def encode_places(places: Tree, rng: jax.Array | None) -> dict[str, Cells]:
        inputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), places)
        out = settings.model.apply(encoder, inputs, train=rng is not None, rng=rng)
        maps = {**out["maps"], FUSED: out["fused"][:, None]}
        masks = {**out["mask"], FUSED: out["fused_mask"][:, None]}
        return {
            name: Cells(
                maps[name].reshape(-1, s, *maps[name].shape[1:2], h * w, settings.widths[name]),
                masks[name].reshape(-1, s, *masks[name].shape[1:2], h * w),
            )
            for name in settings.heads
        }

    return in_parts(encode_places, settings.cfg.objective.microbatches, dict(views["sensors"]), rng)


def sharding_rules(cfg: config_dict.ConfigDict, sensors: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Rules over the joined tree {"params", "teacher", "memory"}, one per module (core.sharding has the tactics).

    Args:
        cfg: the whole configuration.
        sensors: of the model.

    Returns:
        ((pattern, tactic), ...), without those of the bank (objectives.geo).
    """
    modules = [*sensors, *(f"head_{name}" for name in sensors if name != SWIN), "fusion"]
    rules = [(f"(params|teacher)/encoder/{module}/.+", "fsdp") for module in modules]
    if cfg.model.calendar != "none":
        rules.append(("(params|teacher)/encoder/ctpe", "fsdp"))
    rules += [(f"(params|teacher)/heads/{name}/.+", "fsdp") for name in (*sensors, FUSED)]
    return (*rules, ("params/align/[a-z0-9]+/kernel", "fsdp"), ("memory/centre/[a-z0-9]+", "replicate"))
