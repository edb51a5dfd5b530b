"""SkySense: three encoders on one grid, a calendar, a fusion transformer per grid cell, the context of its region.

This file wires the modules of models.skysense_modules; objectives.skysense trains them. Facts follow the SkySense
release (models/*.py) and SkySense++ (skysense_pp_pipeline.py); where they leave a choice open, the comment at the
choice says so.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from skysense_jax.core.rngs import name_hash
from skysense_jax.core.shapes import FeatureMap, Key, MapSeries, Mask
from skysense_jax.core.sharding import gathered
from skysense_jax.models.inputs import PLACE, PlaceInput, check_inputs, normalise
from skysense_jax.models.skysense_modules import (
    HEADS,
    SENSOR_ORDER,
    SWIN,
    build_modules,
    has_calendar,
    module_names,
    smallest_input,
)
from skysense_jax.nn.attention import trunc_normal
from skysense_jax.nn.geo import geo_context
from skysense_jax.nn.position import CALENDAR_DAYS, calendar_rows
from skysense_jax.ops import prototypes, regions
from skysense_jax.sensors import Contract

Params = dict[str, Any]


class Model(NamedTuple):
    """The functions of a model, see :func:`make_model`."""

    init: Callable[..., Params]
    apply: Callable[..., dict[str, Any]]
    query: Callable[[Params, FeatureMap], FeatureMap]


def region_side(geo: config_dict.ConfigDict) -> int:
    """`side` of ops.regions.cell_ids for config.model.geo_context."""
    return math.isqrt(geo.regions) if geo.table == "hashed" else regions.ALONE


def fused_width(cfg: config_dict.ConfigDict, contract: Contract) -> int:
    """Channels of the fused map.

    Args:
        cfg: config.model.
        contract: the input contract.

    Returns:
        The fusion's width E, plus the geo-context's where the model has it.
    """
    return cfg.fusion.embed_dims + (cfg.geo_context.width if "geo" in module_names(cfg, contract) else 0)


def empty_bank(cfg: config_dict.ConfigDict, rng: Key) -> Params:
    """The prototype bank of config.model.geo_context before anything was learnt.

    Args:
        cfg: config.model.
        rng: random key of the prototypes.

    Returns:
        The bank (ops.prototypes).
    """
    geo = cfg.geo_context
    return prototypes.empty_bank(rng, geo.regions, geo.prototypes, geo.width, geo.cell, region_side(geo))


def without_bank(cfg: config_dict.ConfigDict, contract: Contract) -> config_dict.ConfigDict:
    """The configuration of the same model without its geo-context.

    Args:
        cfg: config.model.
        contract: the input contract.

    Returns:
        config.model, a copy.
    """
    cfg = copy.deepcopy(cfg)
    with cfg.unlocked():
        cfg.modules = tuple(name for name in module_names(cfg, contract) if name != "geo")
        cfg.geo_context.bank = "none"
    return cfg


def with_bank(params: Params, bank: Params | None) -> Params:
    """A model's parameters with another prototype bank in their module geo.

    Args:
        params: of the model, with or without a bank.
        bank: any of the model's width, whatever its regions and its grid; None: no bank.

    Returns:
        The parameters, a new dictionary; "geo" is absent where nothing is in it.
    """
    geo = {name: value for name, value in params.get("geo", {}).items() if name != "bank"}
    if bank is not None:
        geo["bank"] = bank
    others = {name: value for name, value in params.items() if name != "geo"}
    return {**others, "geo": geo} if geo else others


def cell_mask(valid: Mask, grid: tuple[int, int]) -> Mask:
    """Which cells of a map are valid: those with at least half of their pixels valid.

    Pixels that a ViT padded at the bottom and the right count as invalid.

    Args:
        valid: [B, T, H, W] of the pixels.
        grid: (h, w) of the map.

    Returns:
        [B, T, h, w] float32, 1 = valid.
    """
    b, t, h, w = valid.shape
    cell = -(-h // grid[0])
    valid = jnp.pad(valid, ((0, 0), (0, 0), (0, grid[0] * cell - h), (0, grid[1] * cell - w)))
    share = valid.reshape(b, t, grid[0], cell, grid[1], cell).mean(axis=(3, 5))
    return (share >= 0.5).astype(jnp.float32)


def fusion_sequence(
    maps: Mapping[str, MapSeries],
    masks: Mapping[str, Mask],
    dates: Mapping[str, jax.Array],
    calendar: str,
    table: jax.Array | None,
) -> tuple[jax.Array, Mask]:
    """The sequences that the fusion takes, one per cell: sensors in the order HR, S2, S1, their dates inside.

    Args:
        maps: {sensor: [B, T, h, w, D]}.
        masks: {sensor: [B, T, h, w]}, 0 = the cell is invalid.
        dates: {sensor: [B, T]} int day of the year, -1 unknown.
        calendar: to which maps the table's rows are added: S2 only ("s2", what the released code does), all whose date
            is known ("dated", the paper's formula), or none ("none").
        table: of the calendar, [1, 365, D]; None with "none".

    Returns:
        (sequences [B, h, w, n, D], mask [B, h, w, n] bool).

    Raises:
        ValueError: the calendar needs a table and there is none.
    """
    sequences, visible = [], []
    for name in SENSOR_ORDER:
        if name not in maps:
            continue
        x = maps[name]
        if calendar in ("dated", name):
            if table is None:
                raise ValueError(f"the parameters have no calendar table (ctpe); model.calendar={calendar!r} needs one")
            x = x + calendar_rows(gathered(table), dates[name])[:, :, None, None, :].astype(x.dtype)
        sequences.append(x.transpose(0, 2, 3, 1, 4))
        visible.append(masks[name].transpose(0, 2, 3, 1))
    return jnp.concatenate(sequences, axis=3), jnp.concatenate(visible, axis=3) > 0


def make_model(cfg: config_dict.ConfigDict, contract: Contract) -> Model:
    """A SkySense model for the sensors of an input contract.

    init(rng, inputs=None) -> params, float32
        {"hr", "s2", "s1", "head_s2", "head_s1", "fusion", "geo", "ctpe"}: those that the contract's sensors need
        (:func:`module_names`), whatever subset of them `inputs` has. inputs: a PlaceInput (arrays or ShapeDtypeStructs)
        for the door check, or None to skip it. The prototype bank is not among the parameters, because nothing is
        optimised in it (:func:`with_bank`); "geo" is absent where the bank is as wide as the fused map.

    apply(params, inputs, *, train=False, rng=None) -> outputs
        inputs: a PlaceInput of any subset of the sensors, any T. rng: needed with train=True where a drop_path is
        positive. Masked cells and dates are not seen by the fusion. The outputs are

        "maps"        {sensor: [B, T, h, w, D]} on the base grid
        "mask"        {sensor: [B, T, h, w]} float32 validity of the cells
        "vit"         {sensor: [B, T, h/p, w/p, C]} of s2 and s1, before the UP head
        "hr_stages"   tuple of [B, T, H_i, W_i, C_i] at strides patch * 2^i; only with hr
        "fused"       [B, h, w, E]; with geo-context [B, h, w, E + D], the last D the context
        "fused_mask"  [B, h, w], 1 where any input is valid

        The context is 0 where params["geo"] has no bank, the inputs have no "place", or the bank does not know the
        place (prototypes.at_places). Without the fusion (`cfg.modules`) "fused" and "fused_mask" are absent; without
        its UP head a sensor's map and mask stay on the ViT's grid [B, T, ceil(h/p), ceil(w/p)].

    query(params, fused [..., E]) -> [..., D]
        What of a fused map the prototype bank learns from.

    Args:
        cfg: config.model.
        contract: the input contract.

    Returns:
        The three functions.

    Raises:
        ValueError: from build_modules, and from `apply` for inputs that break the contract or a bank of another width.
    """
    modules = build_modules(cfg, contract)

    def init(rng: Key, inputs: PlaceInput | None = None) -> Params:
        if inputs is not None:
            check_inputs(inputs, contract)
        params: Params = {}
        for name, module in modules.items():
            key = jax.random.fold_in(rng, name_hash(name))
            variables = module.init(key, jnp.zeros(smallest_input(name, cfg, contract)))
            if variables:  # a module without parameters has none
                params[name] = variables["params"]
        if has_calendar(cfg, modules):
            key = jax.random.fold_in(rng, name_hash("ctpe"))
            params["ctpe"] = trunc_normal(key, (1, CALENDAR_DAYS, cfg.width), jnp.float32)
        return params

    def apply(params: Params, inputs: PlaceInput, *, train: bool = False, rng: Key | None = None) -> dict[str, Any]:
        h, w = check_inputs(inputs, contract)
        place, inputs = inputs.get(PLACE), {name: sensor for name, sensor in inputs.items() if name != PLACE}

        def apply_module(name: str, *args: Any, **options: Any) -> Any:
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
                stages = apply_module(name, image)
                outputs["hr_stages"] = tuple(m.reshape(b, t, *m.shape[1:]) for m in stages)
                outputs["maps"][name] = outputs["hr_stages"][-1]
            else:
                (tokens,) = apply_module(name, image)
                outputs["vit"][name] = tokens.reshape(b, t, *tokens.shape[1:])
                outputs["maps"][name] = outputs["vit"][name]
                if HEADS[name] in modules:
                    up = cast(FeatureMap, modules[HEADS[name]].apply({"params": params[HEADS[name]]}, tokens))
                    outputs["maps"][name] = up[:, :h, :w].reshape(b, t, h, w, -1)
            outputs["mask"][name] = cell_mask(valid, outputs["maps"][name].shape[2:4])
        if "fusion" not in modules:
            return outputs
        dates = {name: sensor["dates"] for name, sensor in inputs.items()}
        sequence, visible = fusion_sequence(outputs["maps"], outputs["mask"], dates, cfg.calendar, params.get("ctpe"))
        b, n = sequence.shape[0], sequence.shape[3]
        cells, cells_mask = sequence.reshape(b * h * w, n, -1), visible.reshape(b * h * w, n)
        tokens, _ = apply_module("fusion", cells, cells_mask, token_only=True)
        outputs["fused"] = tokens[:, 0].reshape(b, h, w, -1)
        outputs["fused_mask"] = jnp.any(visible, axis=-1).astype(jnp.float32)
        if "geo" in modules:
            outputs["fused"] = jnp.concatenate([outputs["fused"], context(params, outputs["fused"], place)], axis=-1)
        return outputs

    def query(params: Params, fused: FeatureMap) -> FeatureMap:
        return cast(FeatureMap, modules["geo"].apply({"params": params.get("geo", {})}, fused))

    def context(params: Params, fused: FeatureMap, place: prototypes.Place | None) -> FeatureMap:
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


def param_shapes(cfg: config_dict.ConfigDict, contract: Contract) -> Params:
    """The parameter tree of a model, its prototype bank in it; nothing is allocated.

    Args:
        cfg: config.model.
        contract: the input contract.

    Returns:
        A tree of ShapeDtypeStructs.
    """
    shapes = jax.eval_shape(make_model(cfg, contract).init, jax.random.key(0))
    if "geo" not in module_names(cfg, contract):
        return shapes
    return with_bank(shapes, jax.eval_shape(lambda: empty_bank(cfg, jax.random.key(0))))
