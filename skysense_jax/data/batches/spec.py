"""What the training batches look like: shapes and dtypes only, so that models and objectives are built without data."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ml_collections import config_dict

from skysense_jax.core.trees import Tree
from skysense_jax.sensors import Contract, pixels_per_base


class Leaf(NamedTuple):
    """Shape and dtype of one array of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype


def one_sensor_spec(cfg: config_dict.ConfigDict, contract: Contract) -> Tree:
    """A global batch of images of one sensor (`batches.one_sensor`).

    With S = config.model.img_size and C = bands of the contract's widest sensor, a batch has:
        sensor: int32 [B], number of the sensor in the contract, the same in all rows.
        own, pair: measurements of the sensor and of its pair (sensors.SENSORS), {"image" [B, S, S, C], "valid"
            [B, S, S], "bands" [B, C]} float32 in raw units; channels behind the bands of a sensor are 0.
        paired: float32 [B], 1 where the place has both sensors.
        place: {"index" int64 [B]}, number of the place over all datasets.

    Args:
        cfg: the whole configuration; `cfg.data.batch` and `cfg.model.img_size` are read.
        contract: the model's input contract (`sensors.input_contract`).

    Returns:
        The nested dict of the batch with a `Leaf` in place of every array.
    """
    batch, side = int(cfg.data.batch), int(cfg.model.img_size)
    channels = max(len(rule["bands"]) for rule in contract["sensors"].values())
    f32 = np.dtype(np.float32)
    image = {
        "image": Leaf((batch, side, side, channels), f32),
        "valid": Leaf((batch, side, side), f32),
        "bands": Leaf((batch, channels), f32),
    }
    return {
        "sensor": Leaf((batch,), np.dtype(np.int32)),
        "own": image,
        "pair": dict(image),
        "paired": Leaf((batch,), f32),
        "place": {"index": Leaf((batch,), np.dtype(np.int64))},
    }


def views_spec(cfg: config_dict.ConfigDict, contract: Contract) -> Tree:
    """A global batch of views of places with all their sensors (`views.train_batch`).

    The axes are B places, V views, T dates, then rows, columns, channels. "local" is absent when `config.data.n_local`
    is 0.

    Args:
        cfg: the whole configuration; `cfg.data` is read.
        contract: the model's input contract (`sensors.input_contract`).

    Returns:
        The nested dict of the batch with a `Leaf` in place of every array.
    """
    data, batch = cfg.data, int(cfg.data.batch)
    f32, i32 = np.dtype(np.float32), np.dtype(np.int32)

    def views(count: int, size: int) -> Tree:
        inputs = {}
        for name, rule in contract["sensors"].items():
            lead = (batch, count, int(data.dates[name]))
            pixels = size * pixels_per_base(rule, contract["ratio"])
            channels = len(rule["bands"])
            inputs[name] = {
                "image": Leaf((*lead, pixels, pixels, channels), f32),
                "valid": Leaf((*lead, pixels, pixels), f32),
                "bands": Leaf((*lead, channels), f32),
                "dates": Leaf(lead, i32),
            }
        coords = Leaf((batch, count, size, size, 2), f32)
        return {"sensors": inputs, "coords": coords, "cell": Leaf((batch, count), f32)}

    spec = {"global": views(2, int(data.global_size))}
    if data.n_local:
        spec["local"] = views(int(data.n_local), int(data.local_size))
    place = {"index": Leaf((batch,), np.dtype(np.int64)), "lon": Leaf((batch,), f32), "lat": Leaf((batch,), f32)}
    return {**spec, "place": place}
