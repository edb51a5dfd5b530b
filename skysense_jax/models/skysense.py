"""SkySense: three spatial encoders on one grid, a calendar, a fusion transformer per grid cell, the context of its
region. Wired here, trained elsewhere.

Facts follow the SkySense release (models/*.py) and SkySense++ (skysense_pp_pipeline.py); what they leave open is said
at the choice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from skysense_jax.core.rngs import name_hash
from skysense_jax.core.sharding import gathered
from skysense_jax.models.inputs import PLACE, check_inputs, normalise
from skysense_jax.nn.attention import trunc_normal
from skysense_jax.nn.fusion import Fusion
from skysense_jax.nn.geo import GeoQuery, geo_context
from skysense_jax.nn.heads import UPHead
from skysense_jax.nn.position import CALENDAR_DAYS, calendar_rows
from skysense_jax.nn.swin import SwinTransformerV2
from skysense_jax.nn.vit import VisionTransformer
from skysense_jax.ops import prototypes, regions

SENSOR_ORDER = ("hr", "s2", "s1")
"""Sensors a SkySense model can take, in the order of the fusion sequence."""

CALENDARS = ("s2", "dated", "none")

BANKS = ("none", "on", "frozen")
"""model.geo_context.bank: no geo-context; a bank that pretraining updates; a bank as it is."""

TABLES = ("places", "stream", "hashed")
"""model.geo_context.table: regions are the cells of the training places, cells as they come, or all, sharing them."""

SWIN = "hr"
"""The sensor whose encoder is a Swin; the others have a ViT."""

HEADS = {"s2": "head_s2", "s1": "head_s1"}
"""The UP head that brings a ViT's map to the common grid."""

Params = dict[str, Any]


class Model(NamedTuple):
    """init(rng, inputs=None) -> params; apply(params, inputs, *, train=False, rng=None) -> outputs; query(params, fused
    [..., E]) -> [..., D], what of a fused map the prototype bank learns from. See :func:`make_model`.
    """

    init: Callable[..., Params]
    apply: Callable[..., dict[str, Any]]
    query: Callable[[Params, jax.Array], jax.Array]


def per_stage(value: Any, stages: int, name: str) -> tuple[int, ...]:
    """A field given once or per stage, as a tuple of one value per stage. Raises ValueError on a wrong length."""
    values = (int(value),) * stages if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != stages:
        raise ValueError(f"model.hr.{name} has {len(values)} values for {stages} stages")
    return values


def module_names(cfg: Any, contract: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the modules a model has: the contract's encoders, their UP heads, fusion, geo (the context, with its
    bank) where model.geo_context.bank is not "none"; or those of them that `cfg.modules` lists.

    Raises ValueError for a sensor without an encoder, an unknown module, an encoder or a head that is missing where
    the listed modules need it.
    """
    sensors = contract["sensors"]
    unknown = [name for name in sensors if name not in SENSOR_ORDER]
    if unknown or not sensors:
        raise ValueError(
            f"SkySense encodes {', '.join(SENSOR_ORDER)}; the input contract asks for {unknown or 'nothing'}"
        )
    mapped = [part for name in SENSOR_ORDER if name in sensors for part in (name, HEADS.get(name)) if part] + ["fusion"]
    whole = mapped + ["geo"] * _has_bank(cfg)
    listed = cfg.get("modules") or whole
    if stray := [name for name in listed if name not in whole]:
        raise ValueError(f"model.modules lists {stray}; a model of {', '.join(sensors)} has {', '.join(whole)}")
    needed = mapped if "fusion" in listed or "geo" in listed else sensors
    if missing := [name for name in needed if name not in listed]:
        raise ValueError(
            f"model.modules = {tuple(listed)} lacks {missing}: the fusion needs every sensor's encoder "
            "and head, geo needs the fusion, and every sensor of the input contract its encoder"
        )
    return tuple(name for name in whole if name in listed)


def build_modules(cfg: Any, contract: Mapping[str, Any]) -> dict[str, Any]:
    """The Linen modules of a model by parameter name (:func:`module_names`).

    Raises ValueError where fields contradict each other or the contract asks for a sensor SkySense has no encoder for.
    """
    sensors, names = contract["sensors"], module_names(cfg, contract)
    if cfg.calendar not in CALENDARS:
        raise ValueError(f"model.calendar must be one of {CALENDARS}, got {cfg.calendar!r}")
    if contract["ratio"] != cfg.ratio:
        raise ValueError(f"model.ratio is {cfg.ratio}, the input contract's ratio is {contract['ratio']}")
    dtype = jnp.dtype(cfg.dtype)
    modules: dict[str, Any] = {}
    if SWIN in sensors:
        hr, stages = cfg.hr, len(cfg.hr.depths)
        stride, width = hr.patch * 2 ** (stages - 1), hr.embed_dims * 2 ** (stages - 1)
        if stride != cfg.ratio or width != cfg.width:
            raise ValueError(
                f"the HR encoder has stride {stride} and width {width}; model.ratio {cfg.ratio} and "
                f"model.width {cfg.width} must equal them"
            )
        modules["hr"] = SwinTransformerV2(
            hr.embed_dims,
            hr.patch,
            tuple(hr.depths),
            per_stage(hr.num_heads, stages, "num_heads"),
            per_stage(hr.window, stages, "window"),
            per_stage(hr.pretrained_windows, stages, "pretrained_windows"),
            mlp_ratio=hr.mlp_ratio,
            extra_norm_every=hr.extra_norm_every,
            pad_small_map=hr.pad_small_map,
            drop=hr.drop_path,
            before_norm=hr.drop_path_before_norm,
            branch_scale=hr.branch_scale,
            outputs=tuple(range(stages)),
            eps=hr.eps,
            remat=cfg.remat,
            dtype=dtype,
        )
    for name in ("s2", "s1"):
        if name in sensors:
            vit = cfg[name]
            modules[name] = VisionTransformer(
                vit.embed_dims,
                vit.patch,
                vit.depth,
                vit.num_heads,
                (vit.img_size // vit.patch,) * 2,
                mlp_ratio=vit.mlp_ratio,
                eps=vit.eps,
                drop=vit.drop_path,
                cls_token=vit.cls_token,
                remat=cfg.remat,
                dtype=dtype,
            )
        if HEADS.get(name) in names:
            modules[HEADS[name]] = UPHead(cfg.width, cfg[name].patch, dtype)
    if "fusion" in names:
        fusion = cfg.fusion
        modules["fusion"] = Fusion(
            fusion.embed_dims,
            fusion.depth,
            fusion.num_heads,
            mlp_ratio=fusion.mlp_ratio,
            eps=fusion.eps,
            drop=fusion.drop_path,
            remat=cfg.remat,
            dtype=dtype,
        )
    if "geo" in names:
        modules["geo"] = GeoQuery(cfg.geo_context.width, dtype)
    return modules


def _has_bank(cfg: Any) -> bool:
    """Whether config.model asks for geo-context; ValueError where its fields make no sense."""
    geo = cfg.get("geo_context")
    if geo is None:
        return False
    if geo.bank not in BANKS:
        raise ValueError(f"model.geo_context.bank must be one of {BANKS}, got {geo.bank!r}")
    if geo.table not in TABLES:
        raise ValueError(f"model.geo_context.table must be one of {TABLES}, got {geo.table!r}")
    if geo.regions < 1 or geo.prototypes < 2 or geo.width < 1:
        raise ValueError(
            f"model.geo_context: {geo.regions} regions of {geo.prototypes} prototypes of width "
            f"{geo.width}; at least 1, 2 and 1"
        )
    if geo.table == "hashed" and (geo.regions < 4 or math.isqrt(geo.regions) ** 2 != geo.regions):
        raise ValueError(f"model.geo_context.regions={geo.regions}: table='hashed' needs a square number, 4 or more")
    return geo.bank != "none"


def region_side(geo: Any) -> int:
    """`side` of ops.regions.cell_ids for config.model.geo_context."""
    return math.isqrt(geo.regions) if geo.table == "hashed" else regions.ALONE


def fused_width(cfg: Any, contract: Mapping[str, Any]) -> int:
    """Channels of the fused map: the fusion's width E, with the geo-context's behind it where the model has it."""
    return cfg.fusion.embed_dims + (cfg.geo_context.width if "geo" in module_names(cfg, contract) else 0)


def empty_bank(cfg: Any, rng: jax.Array) -> Params:
    """The prototype bank of config.model.geo_context before anything was learnt (:mod:`ops.prototypes`)."""
    geo = cfg.geo_context
    return prototypes.empty_bank(rng, geo.regions, geo.prototypes, geo.width, geo.cell, region_side(geo))


def without_bank(cfg: Any, contract: Mapping[str, Any]) -> Any:
    """config.model of the same model without its geo-context."""
    cfg = copy.deepcopy(cfg)
    with cfg.unlocked():
        cfg.modules = tuple(name for name in module_names(cfg, contract) if name != "geo")
        cfg.geo_context.bank = "none"
    return cfg


def with_bank(params: Params, bank: Params | None) -> Params:
    """A model's parameters with a prototype bank in their module geo; None: without one. Any bank of the model's width
    will do, whatever its regions and its grid.
    """
    rest = {name: part for name, part in params.get("geo", {}).items() if name != "bank"}
    geo = rest if bank is None else {**rest, "bank": bank}
    return {name: part for name, part in params.items() if name != "geo"} | ({"geo": geo} if geo else {})


def cell_mask(valid: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """[B,T,H,W] pixel validity -> [B,T,h,w] float32 on the grid of a map: 1 where at least half of a cell's pixels are
    valid. Pixels that a ViT padded at the bottom and the right count as invalid.
    """
    b, t, h, w = valid.shape
    cell = -(-h // grid[0])
    valid = jnp.pad(valid, ((0, 0), (0, 0), (0, grid[0] * cell - h), (0, grid[1] * cell - w)))
    share = valid.reshape(b, t, grid[0], cell, grid[1], cell).mean(axis=(3, 5))
    return (share >= 0.5).astype(jnp.float32)


def has_calendar(cfg: Any, modules: Any) -> bool:
    """Whether a model with these modules holds the calendar table: it is added in front of the fusion."""
    return cfg.calendar != "none" and "fusion" in modules


def fusion_sequence(
    maps: Mapping[str, jax.Array],
    masks: Mapping[str, jax.Array],
    dates: Mapping[str, jax.Array],
    calendar: str,
    table: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The sequences of all cells: maps {sensor: [B,T,h,w,D]} in the order HR, S2, S1, dates inside -> ([B,h,w,n,D],
    mask [B,h,w,n]).

    The calendar table's rows are added to S2 only (calendar "s2", what the released code does), to every input whose
    date is known ("dated", the paper's formula), or to nothing ("none"; table None).
    """
    parts, seen = [], []
    for name in SENSOR_ORDER:
        if name not in maps:
            continue
        x = maps[name]
        if calendar in ("dated", name):
            x = x + calendar_rows(gathered(table), dates[name])[:, :, None, None, :].astype(x.dtype)
        parts.append(x.transpose(0, 2, 3, 1, 4))
        seen.append(masks[name].transpose(0, 2, 3, 1))
    return jnp.concatenate(parts, axis=3), jnp.concatenate(seen, axis=3) > 0


def make_model(cfg: Any, contract: Mapping[str, Any]) -> Model:
    """A SkySense model from `config.model` and an input contract (sensors.input_contract).

    init(rng, inputs=None) -> params {"hr","s2","s1","head_s2","head_s1","fusion","geo","ctpe"}: those of the contract's
    sensors (:func:`module_names`), whatever subset `inputs` has; float32. inputs: a PlaceInput (arrays or
    ShapeDtypeStructs) for the door check, or None to skip it. The prototype bank is not among them: nothing is
    optimised in it (:func:`with_bank`); "geo" is absent where the bank is as wide as the fused map.

    apply(params, inputs, *, train=False, rng=None) with inputs {sensor: {"image" [B,T,H,W,C] raw units, "valid"
    [B,T,H,W], "bands" [B,T,C], "dates" int [B,T] day of year, -1 unknown}}, any subset of the sensors, any T, returns
      "maps": {sensor: [B,T,h,w,D]}, "mask": {sensor: [B,T,h,w]} float32 cell validity, "fused": [B,h,w,E],
      "fused_mask": [B,h,w] (1 where any input is valid), "vit": {sensor: [B,T,h/p,w/p,C]} before the UP head,
      with geo-context "fused": [B,h,w,E+D], the last D the context, 0 where there is none: no bank in params["geo"], no
      inputs["place"] {"lon","lat"} [B] degrees, or a place the bank does not know (prototypes.at_places),
      "hr_stages": tuple of [B,T,H_i,W_i,C_i] at strides patch*2^i (only with hr).
    Without the fusion (`cfg.modules`) there are no "fused" and "fused_mask"; without its UP head a sensor's map and
    mask stay on the ViT's own grid [B,T,ceil(h/p),ceil(w/p)]. Masked cells and dates are not seen by the fusion. rng is
    needed with train=True where a drop_path is positive.
    """
    modules = build_modules(cfg, contract)

    def init(rng: jax.Array, inputs: Mapping[str, Any] | None = None) -> Params:
        if inputs is not None:
            check_inputs(inputs, contract)
        params: Params = {}
        for name, module in modules.items():
            key = jax.random.fold_in(rng, name_hash(name))
            made = module.init(key, jnp.zeros(_smallest(name, cfg, contract)))
            if made:
                params[name] = made["params"]
        if has_calendar(cfg, modules):
            key = jax.random.fold_in(rng, name_hash("ctpe"))
            params["ctpe"] = trunc_normal(key, (1, CALENDAR_DAYS, cfg.width), jnp.float32)
        return params

    def apply(
        params: Params, inputs: Mapping[str, Any], *, train: bool = False, rng: jax.Array | None = None
    ) -> dict[str, Any]:
        h, w = check_inputs(inputs, contract)
        place, inputs = inputs.get(PLACE), {name: sensor for name, sensor in inputs.items() if name != PLACE}

        def run(name: str, *args: Any, **options: bool) -> Any:
            rngs = {}
            if train and rng is not None:
                rngs = {"drop_path": jax.random.fold_in(rng, name_hash(name))}
            return modules[name].apply({"params": params[name]}, *args, train=train, rngs=rngs, **options)

        outputs: dict[str, Any] = {"maps": {}, "mask": {}, "vit": {}}
        for name, sensor in inputs.items():
            image, valid = normalise(sensor, contract["sensors"][name])
            b, t = image.shape[:2]
            image = image.reshape(b * t, *image.shape[2:])
            if name == SWIN:
                stages = run(name, image)
                outputs["hr_stages"] = tuple(m.reshape(b, t, *m.shape[1:]) for m in stages)
                outputs["maps"][name] = outputs["hr_stages"][-1]
            else:
                (tokens,) = run(name, image)
                outputs["vit"][name] = tokens.reshape(b, t, *tokens.shape[1:])
                outputs["maps"][name] = outputs["vit"][name]
                if HEADS[name] in modules:
                    up = modules[HEADS[name]].apply({"params": params[HEADS[name]]}, tokens)
                    outputs["maps"][name] = up[:, :h, :w].reshape(b, t, h, w, -1)
            outputs["mask"][name] = cell_mask(valid, outputs["maps"][name].shape[2:4])
        if "fusion" not in modules:
            return outputs
        dates = {name: sensor["dates"] for name, sensor in inputs.items()}
        sequence, seen = fusion_sequence(outputs["maps"], outputs["mask"], dates, cfg.calendar, params.get("ctpe"))
        b, n = sequence.shape[0], sequence.shape[3]
        tokens, _ = run("fusion", sequence.reshape(b * h * w, n, -1), seen.reshape(b * h * w, n), token_only=True)
        outputs["fused"] = tokens[:, 0].reshape(b, h, w, -1)
        outputs["fused_mask"] = jnp.any(seen, axis=-1).astype(jnp.float32)
        if "geo" in modules:
            outputs["fused"] = jnp.concatenate([outputs["fused"], context(params, outputs["fused"], place)], axis=-1)
        return outputs

    def query(params: Params, fused: jax.Array) -> jax.Array:
        return modules["geo"].apply({"params": params.get("geo", {})}, fused)

    def context(params: Params, fused: jax.Array, place: Mapping[str, jax.Array] | None) -> jax.Array:
        bank = params.get("geo", {}).get("bank")
        if bank is None or place is None:
            return jnp.zeros((*fused.shape[:-1], cfg.geo_context.width), fused.dtype)
        if bank["prototypes"].shape[-1] != cfg.geo_context.width:
            raise ValueError(
                f"the bank has prototypes of width {bank['prototypes'].shape[-1]}, "
                f"model.geo_context.width is {cfg.geo_context.width}"
            )
        return geo_context(query(params, fused), *prototypes.at_places(bank, place, region_side(cfg.geo_context)))

    return Model(init, apply, query)


def param_shapes(cfg: Any, contract: Mapping[str, Any]) -> Params:
    """The parameter tree of a model, its prototype bank in it, as ShapeDtypeStructs; nothing is allocated."""
    shapes = jax.eval_shape(make_model(cfg, contract).init, jax.random.key(0))
    if "geo" not in module_names(cfg, contract):
        return shapes
    return with_bank(shapes, jax.eval_shape(lambda: empty_bank(cfg, jax.random.key(0))))


def _smallest(name: str, cfg: Any, contract: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of the smallest input a module accepts: parameters do not depend on it, the time to initialise does."""
    if name == SWIN:
        windows = per_stage(cfg.hr.window, len(cfg.hr.depths), "window")
        side = max(window * cfg.hr.patch * 2**stage for stage, window in enumerate(windows))
        return (1, side, side, len(contract["sensors"]["hr"]["bands"]))
    if name in ("fusion", "geo"):
        return (1, 1, cfg.width if name == "fusion" else cfg.fusion.embed_dims)
    if name.startswith("head_"):
        return (1, 1, 1, cfg[name[len("head_") :]].embed_dims)
    return (1, cfg[name].patch, cfg[name].patch, len(contract["sensors"][name]["bands"]))
