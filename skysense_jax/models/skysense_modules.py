"""The modules of a SkySense model: which ones a configuration and an input contract ask for, and their fields."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import config_dict

from skysense_jax.nn.fusion import Fusion
from skysense_jax.nn.geo import GeoQuery
from skysense_jax.nn.heads import UPHead
from skysense_jax.nn.swin import SwinTransformerV2
from skysense_jax.nn.vit import VisionTransformer
from skysense_jax.sensors import Contract

SENSOR_ORDER = ("hr", "s2", "s1")
"""Sensors a SkySense model can take, in the order of the fusion sequence."""

CALENDARS = ("s2", "dated", "none")

BANKS = ("none", "on", "frozen")
"""model.geo_context.bank: no geo-context; a bank that pretraining updates; a bank as it is."""

TABLES = ("places", "stream", "hashed")
"""model.geo_context.table: which cells have a region: those of the training places, cells as they come, or all cells,
which then share regions."""

SWIN = "hr"
"""The sensor whose encoder is a Swin; the others have a ViT."""

HEADS = {"s2": "head_s2", "s1": "head_s1"}
"""The UP head that brings a ViT's map to the common grid."""


def module_names(cfg: config_dict.ConfigDict, contract: Contract) -> tuple[str, ...]:
    """Names of the modules a model has.

    They are the encoders of the contract's sensors, their UP heads, "fusion", and "geo" (the context, with its bank)
    where model.geo_context.bank is not "none"; or those of them that `cfg.modules` lists.

    Args:
        cfg: config.model.
        contract: the input contract.

    Returns:
        The names, in the order in which a place passes through the modules.

    Raises:
        ValueError: a sensor has no encoder, a listed module is unknown, or an encoder or a head is missing that the
            listed modules need.
    """
    sensors = contract["sensors"]
    unknown = [name for name in sensors if name not in SENSOR_ORDER]
    if unknown or not sensors:
        raise ValueError(
            f"SkySense encodes {', '.join(SENSOR_ORDER)}; the input contract asks for {unknown or 'nothing'}"
        )
    mapped = []
    for name in SENSOR_ORDER:
        if name in sensors:
            mapped.append(name)
            if name in HEADS:
                mapped.append(HEADS[name])
    mapped.append("fusion")
    whole = [*mapped, "geo"] if _has_bank(cfg) else mapped
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


def build_modules(cfg: config_dict.ConfigDict, contract: Contract) -> dict[str, nn.Module]:
    """The Linen modules of a model by parameter name (:func:`module_names`).

    Args:
        cfg: config.model.
        contract: the input contract.

    Returns:
        {name: module}.

    Raises:
        ValueError: fields contradict each other, or the contract asks for a sensor SkySense has no encoder for.
    """
    sensors, names = contract["sensors"], module_names(cfg, contract)
    if cfg.calendar not in CALENDARS:
        raise ValueError(f"model.calendar must be one of {CALENDARS}, got {cfg.calendar!r}")
    if contract["ratio"] != cfg.ratio:
        raise ValueError(f"model.ratio is {cfg.ratio}, the input contract's ratio is {contract['ratio']}")
    dtype = jnp.dtype(cfg.dtype)
    modules: dict[str, nn.Module] = {}
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
    for name in HEADS:
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


def has_calendar(cfg: config_dict.ConfigDict, modules: Container[str]) -> bool:
    """Whether a model has the calendar table, which is added in front of the fusion.

    Args:
        cfg: config.model.
        modules: names of the model's modules.

    Returns:
        True or False.
    """
    return cfg.calendar != "none" and "fusion" in modules


def _has_bank(cfg: config_dict.ConfigDict) -> bool:
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


def per_stage(value: int | Sequence[int], stages: int, name: str) -> tuple[int, ...]:
    """A field that has one value for all stages, or one for each.

    Args:
        value: of the field.
        stages: number of stages.
        name: of the field in model.hr, for the error.

    Returns:
        One value per stage.

    Raises:
        ValueError: there are as many values as neither.
    """
    values = (int(value),) * stages if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != stages:
        raise ValueError(f"model.hr.{name} has {len(values)} values for {stages} stages")
    return values


def smallest_input(name: str, cfg: config_dict.ConfigDict, contract: Contract) -> tuple[int, ...]:
    """The smallest input that a module accepts: parameters do not depend on it, the time to initialise does.

    Args:
        name: of the module.
        cfg: config.model.
        contract: the input contract.

    Returns:
        Its shape.
    """
    if name == SWIN:
        windows = per_stage(cfg.hr.window, len(cfg.hr.depths), "window")
        side = max(window * cfg.hr.patch * 2**stage for stage, window in enumerate(windows))
        return (1, side, side, len(contract["sensors"]["hr"]["bands"]))
    if name in ("fusion", "geo"):
        return (1, 1, cfg.width if name == "fusion" else cfg.fusion.embed_dims)
    if name.startswith("head_"):
        return (1, 1, 1, cfg[name[len("head_") :]].embed_dims)
    return (1, cfg[name].patch, cfg[name].patch, len(contract["sensors"][name]["bands"]))
