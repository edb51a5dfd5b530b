"""What the training batches look like: shapes and dtypes only, so that models and objectives are built without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from skysense_jax.sensors import pixels_per_base


class Leaf(NamedTuple):
    """Shape and dtype of one array of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype


def one_sensor_spec(cfg: Any, contract: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of a global batch of one sensor's images (`batches.one_sensor`), with a `Leaf` in the place of every
    array.

    sensor int32 [B]: number of the sensor in the contract, the same in all rows. own, pair: what it and its pair
    (sensors.SENSORS) measured, {"image" [B, S, S, C], "valid" [B, S, S], "bands" [B, C]} float32 in raw units; S =
    config.model.img_size, C = bands of the contract's widest sensor, those behind a sensor's own are 0. paired float32
    [B]: 1 where the place has both. place: {"index" int64 [B]}, the number of the place over all datasets.
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


def views_spec(cfg: Any, contract: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of a global batch of views of whole places (`views.train_batch`), with a `Leaf` in the place of
    every array.

    cfg: the whole configuration (`cfg.data` is read); contract: `sensors.input_contract`. Axes: B places, V views, T
    dates, then rows, columns, channels. "local" is absent when `config.data.n_local` is 0.
    """
    data, batch = cfg.data, int(cfg.data.batch)
    f32, i32 = np.dtype(np.float32), np.dtype(np.int32)

    def views(count: int, size: int) -> dict[str, Any]:
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
