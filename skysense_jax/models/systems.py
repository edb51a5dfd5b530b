"""The table of systems: what each kind of network is. Nothing outside of this table compares model names.

A system is chosen by config.model.name. Its objective, data and torch layout are other tables, with the same keys or
with rows that name it: `recipes.RECIPES`, `convert.layouts.LAYOUTS`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from ml_collections import config_dict

from skysense_jax.core.shapes import Key
from skysense_jax.core.trees import Tree
from skysense_jax.models import msgfm, msgfm_outputs, skysense, skysense_outputs
from skysense_jax.models.inputs import PlaceInput
from skysense_jax.sensors import Contract

Features = Callable[[Tree, PlaceInput], dict[str, jax.Array]]
"""(params, places) -> {"image" [B, E], "pixel" [B, h, w, E], "<sensor>_image", "<sensor>_pixel"}, float32."""


class System(NamedTuple):
    """One kind of network. `model` below is config.model, `contract` an input contract (`sensors.input_contract`).

    Attributes:
        fields: vocabulary of config.model, by section.
        of_sensors: those sections that describe the encoder of one sensor.
        trained_tree: the tree of a run (`objectives.base`) whose "encoder" is the network to keep.
        encodes_sensors_alone: each sensor is encoded alone, so that any of them gives all features, and images need no
            position on the ground.
        module_names: (model, contract) -> names of the top-level parameters.
        make_model: (model, contract) -> the model's functions.
        param_shapes: (model, contract) -> the parameter tree as ShapeDtypeStructs.
        fresh: (model, contract, key) -> freshly drawn parameters, an empty prototype bank among them where the network
            has one.
        make_features: (model, contract) -> the function that gives features, float32.
        has_bank: (model, contract) -> whether the network asks a prototype bank (geo-context).
        reconstructions: what the network makes of hidden pixels, `msgfm_outputs.reconstructions`; None where it draws
            no images.
    """

    fields: Mapping[str, tuple[str, ...]]
    of_sensors: tuple[str, ...]
    trained_tree: str
    encodes_sensors_alone: bool
    module_names: Callable[[config_dict.ConfigDict, Contract], tuple[str, ...]]
    make_model: Callable[[config_dict.ConfigDict, Contract], NamedTuple]
    param_shapes: Callable[[config_dict.ConfigDict, Contract], Tree]
    fresh: Callable[[config_dict.ConfigDict, Contract, Key], Tree]
    make_features: Callable[[config_dict.ConfigDict, Contract], Features]
    has_bank: Callable[[config_dict.ConfigDict, Contract], bool]
    reconstructions: Callable[..., dict[str, Any]] | None = None


def _skysense_fresh(model: config_dict.ConfigDict, contract: Contract, key: Key) -> Tree:
    params = jax.jit(skysense.make_model(model, contract).init)(key)
    if not _skysense_has_bank(model, contract):
        return params
    return skysense.with_bank(params, skysense.empty_bank(model, jax.random.key(0)))


def _skysense_has_bank(model: config_dict.ConfigDict, contract: Contract) -> bool:
    return "geo" in skysense.module_names(model, contract)


def _skysense_features(model: config_dict.ConfigDict, contract: Contract) -> Features:
    return functools.partial(skysense_outputs.encoder_features, skysense.make_model(model, contract))


def _msgfm_fresh(model: config_dict.ConfigDict, contract: Contract, key: Key) -> Tree:
    return jax.jit(msgfm.make_model(model, contract).init)(key)


def _msgfm_features(model: config_dict.ConfigDict, contract: Contract) -> Features:
    return functools.partial(msgfm_outputs.encoder_features, model, contract, msgfm.make_model(model, contract))


_VIT = ("cls_token", "depth", "drop_path", "embed_dims", "eps", "img_size", "mlp_ratio", "num_heads", "patch")

SYSTEMS: dict[str, System] = {
    "skysense": System(
        fields={
            "model": ("name", "dtype", "remat", "width", "ratio", "calendar"),
            "model.hr": (
                "patch",
                "embed_dims",
                "depths",
                "num_heads",
                "window",
                "mlp_ratio",
                "eps",
                "extra_norm_every",
                "pretrained_windows",
                "pad_small_map",
                "drop_path",
                "drop_path_before_norm",
                "branch_scale",
            ),
            "model.s2": _VIT,
            "model.s1": _VIT,
            "model.fusion": ("embed_dims", "depth", "num_heads", "mlp_ratio", "drop_path", "eps"),
            "model.geo_context": ("bank", "regions", "prototypes", "width", "cell", "table"),
        },
        of_sensors=("model.hr", "model.s2", "model.s1"),
        trained_tree="teacher",
        encodes_sensors_alone=False,
        module_names=skysense.module_names,
        make_model=skysense.make_model,
        param_shapes=skysense.param_shapes,
        fresh=_skysense_fresh,
        make_features=_skysense_features,
        has_bank=_skysense_has_bank,
    ),
    "msgfm": System(
        fields={
            "model": (
                "name",
                "dtype",
                "remat",
                "ratio",
                "patch",
                "embed_dims",
                "depths",
                "num_heads",
                "window",
                "img_size",
                "mlp_ratio",
                "drop_path",
                "eps",
            ),
            "model.moe": ("stages", "experts", "capacity", "group", "gate_noise", "aux"),
        },
        of_sensors=(),
        trained_tree="params",
        encodes_sensors_alone=True,
        module_names=msgfm.module_names,
        make_model=msgfm.make_model,
        param_shapes=msgfm.param_shapes,
        fresh=_msgfm_fresh,
        make_features=_msgfm_features,
        has_bank=lambda model, contract: False,
        reconstructions=msgfm_outputs.reconstructions,
    ),
}
"""config.model.name -> what the network is."""


def system_of(model: config_dict.ConfigDict) -> System:
    """The row of config.model. Raises ValueError for a name that the table does not have."""
    if model.name not in SYSTEMS:
        raise ValueError(f"config.model.name={model.name!r}: no such network; there are {', '.join(SYSTEMS)}")
    return SYSTEMS[model.name]
