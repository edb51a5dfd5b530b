"""A model small enough to compile in seconds, its input contract and a batch of places; shared by the tests of model
and export.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from ml_collections import config_dict

from skysense_jax import sensors
from skysense_jax.models.skysense import make_model

BANDS = {"hr": ("R", "G", "B"), "s2": ("B02", "B03", "B08"), "s1": ("VV", "VH")}


def config(**changes: Any) -> config_dict.ConfigDict:
    """config.model of a tiny model. changes: top-level fields; edit the result for others."""
    vit = {
        "patch": 2,
        "embed_dims": 8,
        "depth": 2,
        "num_heads": 2,
        "mlp_ratio": 2,
        "img_size": 8,
        "drop_path": 0.2,
        "cls_token": False,
        "eps": 1e-6,
    }
    return config_dict.ConfigDict(
        {
            "name": "skysense",
            "dtype": "float32",
            "remat": False,
            "width": 16,
            "ratio": 4,
            "calendar": "dated",
            "hr": {
                "patch": 2,
                "embed_dims": 8,
                "depths": (2, 2),
                "num_heads": (1, 2),
                "window": 4,
                "mlp_ratio": 2,
                "eps": 1e-5,
                "extra_norm_every": 0,
                "pretrained_windows": (0, 0),
                "pad_small_map": False,
                "drop_path": 0.2,
                "drop_path_before_norm": False,
                "branch_scale": 0.0,
            },
            "s2": dict(vit),
            "s1": dict(vit),
            "fusion": {"embed_dims": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "drop_path": 0.2, "eps": 1e-5},
        }
        | changes
    )


def contract(bands: Any = None, ratio: int = 4) -> dict[str, Any]:
    return sensors.input_contract(bands or BANDS, ratio)


def params(cfg: Any, spec: Any, seed: int = 0) -> Any:
    """Random parameters far from their initial values, so that no term is accidentally zero."""
    shapes = jax.eval_shape(make_model(cfg, spec).init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    scale = {"scale": (1.0, 0.15), "logit_scale": (2.0, 0.5)}

    def leaf(path: Any, x: Any) -> np.ndarray:
        mean, std = scale.get(path[-1].key, (0.0, 0.3))
        return (mean + std * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def inputs(
    spec: Any, dates: Any = None, cells: int = 4, batch: int = 2, seed: int = 0
) -> dict[str, dict[str, np.ndarray]]:
    """A PlaceInput in raw units, everything valid, random dates (HR: unknown)."""
    rng, out = np.random.default_rng(seed), {}
    for name, rule in spec["sensors"].items():
        t = (dates or {"hr": 1, "s2": 3, "s1": 2})[name]
        side, bands = cells * sensors.pixels_per_base(rule, spec["ratio"]), len(rule["bands"])
        noise = rng.standard_normal((batch, t, side, side, bands))
        days = np.sort(rng.integers(0, 365, (batch, t)), axis=1) if name != "hr" else np.full((batch, t), -1)
        out[name] = {
            "image": (np.asarray(rule["mean"]) + np.asarray(rule["std"]) * noise).astype(np.float32),
            "valid": np.ones((batch, t, side, side), np.float32),
            "bands": np.ones((batch, t, bands), np.float32),
            "dates": days.astype(np.int32),
        }
    return out
