"""An msGFM small enough to compile in a second: its configuration and random parameters."""

import jax
import numpy as np
from ml_collections import config_dict

from skysense_jax import sensors
from skysense_jax.models import msgfm

CONTRACT = sensors.input_contract({"hr": ("R", "G", "B"), "s1": ("VV", "VH")}, 4)


def config(**changes):
    """config.model of a tiny model: maps of 8x8 and 4x4 cells at 16 pixels, experts in the second stage."""
    fields = {
        "name": "msgfm",
        "dtype": "float32",
        "remat": False,
        "patch": 2,
        "embed_dims": 4,
        "depths": (1, 2),
        "num_heads": (1, 2),
        "window": 4,
        "img_size": 16,
        "mlp_ratio": 2,
        "drop_path": 0.0,
        "eps": 1e-5,
        "moe": {"stages": (1,), "experts": 2, "capacity": 1.25, "group": 2, "gate_noise": 1.0, "aux": "tutel"},
    }
    return config_dict.ConfigDict(fields | changes)


DENSE = config_dict.ConfigDict({"stages": ()})


def random_params(cfg, contract=CONTRACT, seed=0):
    rng = np.random.default_rng(seed)
    shapes = msgfm.param_shapes(cfg, contract)
    return jax.tree.map(lambda s: (0.5 * rng.standard_normal(s.shape)).astype(np.float32), shapes)
