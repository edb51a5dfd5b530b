"""The frozen batch of an exported folder: inputs, and the outputs that they have when the weights are exported."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import config_dict

from skysense_jax.models import msgfm
from skysense_jax.models.inputs import normalise
from skysense_jax.models.skysense import SWIN, Params, make_model
from skysense_jax.models.skysense_modules import per_stage
from skysense_jax.ops import regions
from skysense_jax.sensors import SENSORS, Contract, pixels_per_base

Inputs = dict[str, dict[str, np.ndarray]]
"""A PlaceInput in raw units; PLACE: where it is; for msGFM with "hidden" [B,T,h,w], 1 = the patch is hidden."""


def skysense_inputs(cfg: config_dict.ConfigDict, contract: Contract, seed: int = 0) -> Inputs:
    """Makes a small deterministic PlaceInput in raw units.

    It has two places, with invalid pixels, a masked date and an unmeasured band.

    Args:
        cfg: config.model of a SkySense network.
        contract: its input contract.
        seed: of the noise and the dates.

    Returns:
        The inputs of every sensor of the contract: image, valid, bands, dates.
    """
    rng = np.random.default_rng(seed)
    cells = 4
    if SWIN in contract["sensors"]:
        windows = per_stage(cfg.hr.window, len(cfg.hr.depths), "window")
        cells = max(-(-window * cfg.hr.patch * 2**stage // cfg.ratio) for stage, window in enumerate(windows))
    inputs = {}
    for name, rule in contract["sensors"].items():
        dates = 3 if SENSORS[name].dated else 1
        side, bands = cells * pixels_per_base(rule, cfg.ratio), len(rule["bands"])
        noise = rng.standard_normal((2, dates, side, side, bands))
        valid = np.ones((2, dates, side, side), np.float32)
        valid[0, 0, : side // 4] = 0
        measured = np.ones((2, dates, bands), np.float32)
        if dates > 1:
            valid[1, -1] = 0
            measured[0, 1, 0] = 0
        days = rng.integers(0, 365, (2, dates)) if SENSORS[name].dated else np.full((2, dates), -1)
        inputs[name] = {
            "image": (np.asarray(rule["mean"]) + np.asarray(rule["std"]) * noise).astype(np.float32),
            "valid": valid,
            "bands": measured,
            "dates": np.sort(days, axis=1).astype(np.int32),
        }
    return inputs


def frozen_place(bank: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Says where the two frozen places are: in the first region of the bank that was visited, and nowhere (nan)."""
    cells = np.asarray(bank["cells"])[np.asarray(bank["visits"]) > 0]
    lon, lat = regions.cell_centre(cells[0], bank["lon_edges"], bank["lat_edges"]) if len(cells) else (0.0, 0.0)
    return {name: np.array([value, np.nan], np.float32) for name, value in (("lon", lon), ("lat", lat))}


def skysense_outputs(
    params: Params, cfg: config_dict.ConfigDict, contract: Contract, inputs: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Runs a SkySense network on a frozen batch.

    Args:
        params: of the network.
        cfg: its config.model.
        contract: its input contract.
        inputs: of :func:`skysense_inputs`.

    Returns:
        fused [B,E,h,w], fused_mask, maps.<sensor> [B,T,D,h,w], mask.<sensor>, hr_stages.<i> [B,T,C,H,W].
    """
    outputs = jax.device_get(jax.jit(make_model(cfg, contract).apply)(params, inputs))
    flat = {}
    if "fused" in outputs:
        flat = {"fused": channels_first(outputs["fused"]), "fused_mask": outputs["fused_mask"]}
    flat |= {f"maps.{name}": channels_first(x) for name, x in outputs["maps"].items()}
    flat |= {f"mask.{name}": x for name, x in outputs["mask"].items()}
    return flat | {f"hr_stages.{i}": channels_first(x) for i, x in enumerate(outputs.get("hr_stages", ()))}


def msgfm_inputs(cfg: config_dict.ConfigDict, contract: Contract, seed: int = 0) -> Inputs:
    """Makes a small deterministic PlaceInput in raw units.

    It has two places, images of the training's size and of others, with invalid pixels, an unmeasured band where there
    are several, and, where the model has a mask token, hidden patches in the second place.

    Args:
        cfg: config.model of an msGFM network.
        contract: its input contract.
        seed: of the noise and the hidden patches.

    Returns:
        The inputs of every sensor of the contract: image, valid, bands and, with a mask token, hidden.
    """
    rng, inputs = np.random.default_rng(seed), {}
    sides = (cfg.img_size, cfg.img_size * 3 // 4, cfg.img_size * 5 // 4)
    for number, (name, rule) in enumerate(contract["sensors"].items()):
        side, bands, tokens = sides[number % 3], len(rule["bands"]), -(-cfg.img_size // cfg.patch)
        noise = rng.standard_normal((2, 1, side, side, bands))
        valid, measured = np.ones((2, 1, side, side), np.float32), np.ones((2, 1, bands), np.float32)
        valid[0, 0, : side // 4] = 0
        measured[1, 0, 1:2] = 0
        inputs[name] = {
            "image": (np.asarray(rule["mean"]) + np.asarray(rule["std"]) * noise).astype(np.float32),
            "valid": valid,
            "bands": measured,
        }
        if msgfm.MASK_TOKEN in msgfm.module_names(cfg, contract):
            hidden = rng.integers(0, 2, (2, 1, tokens, tokens)).astype(np.float32)
            inputs[name]["hidden"] = hidden * np.array([0, 1], np.float32)[:, None, None, None]
    return inputs


def msgfm_outputs(
    params: Params, cfg: config_dict.ConfigDict, contract: Contract, inputs: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Runs an msGFM network on a frozen batch: every acquisition is brought to model.img_size and encoded alone.

    Args:
        params: of the network.
        cfg: its config.model.
        contract: its input contract.
        inputs: of :func:`msgfm_inputs`.

    Returns:
        For every sensor: maps.<sensor> [B,T,D,h,w], the last normalised one; stages.<sensor>.<i> [B,T,C_i,h_i,w_i];
        mask.<sensor> [B,T], 1 where anything was measured; pixels.<sensor>.<target> [B,T,C,S,S], the normalised
        reconstruction by every decoder.
    """
    model, side, flat = msgfm.make_model(cfg, contract), int(cfg.img_size), {}
    decoders = [name for name in contract["sensors"] if msgfm.DECODER.format(name) in params]

    def fold(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    def embed(params: Params, name: str, sensor: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        image, valid = normalise(sensor, contract["sensors"][name])
        b, t, *_, bands = image.shape
        image = jax.image.resize(fold(image), (b * t, side, side, bands), "bilinear")
        hidden = fold(sensor["hidden"]) if "hidden" in sensor else None
        return model.embed(params, name, image, hidden), valid.max((2, 3))

    encode = jax.jit(model.encode)  # compiled once: all sensors have as many tokens
    for name, sensor in inputs.items():
        tokens, valid = jax.jit(embed, static_argnums=1)(params, name, sensor)
        encoded = encode(params, tokens)
        maps = {f"maps.{name}": encoded.final} | {f"stages.{name}.{i}": x for i, x in enumerate(encoded.stages)}
        for target in decoders:
            maps[f"pixels.{name}.{target}"] = jax.jit(model.decode, static_argnums=1)(params, target, encoded.final)
        flat[f"mask.{name}"] = (np.asarray(valid) > 0).astype(np.float32)
        flat |= {key: channels_first(x).reshape(*valid.shape, x.shape[-1], *x.shape[1:3]) for key, x in maps.items()}
    return flat


def channels_first(x: np.ndarray | jax.Array) -> np.ndarray:
    """Brings [..., H, W, C] to [..., C, H, W], contiguous."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(x), -1, -3))
