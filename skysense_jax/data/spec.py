"""The element specs: what a record holds (its TFDS features) and what a training batch looks like. Shapes only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from skysense_jax.sensors import SENSORS


def record_features(sensors: Sequence[str], tile: int, ratio: int, n_classes: int) -> tfds.features.FeaturesDict:
    """Features of a record: one place of N x N base pixels (N = tile), S = N (grid "s2") or N * ratio (grid "hr").

    place, crs: text. lon, lat: float64 degrees of the centre. footprint: float64 [4] left, bottom, right, top in
    `crs`. label: uint8 [K] multi-hot (K = max(n_classes, 1); all 0 = unlabelled). label_map: uint8 [N, N], 255 =
    unlabelled. For each sensor x with C bands (all bands of its table row) and T dates: x_image [T, S, S, C] in the
    stored dtype and unit, 0 where invalid; x_valid, x_clear uint8 [T, S, S]; x_measured uint8 [T, C]; x_date int32 [T]
    days since 1970-01-01, ascending. A missing sensor has T = 0.

    Tensors are stored as raw bytes: encoding a 1 MB series this way costs milliseconds, TFDS's default costs a hundred
    times that.
    """

    def tensor(shape: tuple[int | None, ...], dtype: str) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes")

    features = {
        "place": tfds.features.Text(),
        "crs": tfds.features.Text(),
        "lon": tensor((), "float64"),
        "lat": tensor((), "float64"),  # bytes: a TFDS scalar is stored as float32
        "footprint": tensor((4,), "float64"),
        "label": tensor((max(n_classes, 1),), "uint8"),
        "label_map": tensor((tile, tile), "uint8"),
    }
    for name in sensors:
        row = SENSORS[name]
        side, count = tile * (ratio if row.grid == "hr" else 1), len(row.bands)
        features[f"{name}_image"] = tensor((None, side, side, count), row.dtype)
        features[f"{name}_valid"] = tensor((None, side, side), "uint8")
        features[f"{name}_clear"] = tensor((None, side, side), "uint8")
        features[f"{name}_measured"] = tensor((None, count), "uint8")
        features[f"{name}_date"] = tensor((None,), "int32")
    return tfds.features.FeaturesDict(features)


class Leaf(NamedTuple):
    """Shape and dtype of one array of a batch."""

    shape: tuple[int, ...]
    dtype: np.dtype


def sample_spec(cfg: Any, contract: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of a global batch of one sensor's images (`data.samples`), with a `Leaf` in the place of every
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


def batch_spec(cfg: Any, contract: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of a global training batch (`pipeline.train_batch`) with a `Leaf` in the place of every array.

    cfg: the whole configuration (`cfg.data` is read); contract: `sensors.input_contract`. msGFM's batch is another one,
    :func:`sample_spec`. Axes: B places, V views, T
    dates, then rows, columns, channels. "local" is absent when `config.data.n_local` is 0. Models and objectives are
    built from it, without data.
    """
    if cfg.model.name == "msgfm":
        return sample_spec(cfg, contract)
    data, batch = cfg.data, int(cfg.data.batch)
    f32, i32 = np.dtype(np.float32), np.dtype(np.int32)

    def views(count: int, size: int) -> dict[str, Any]:
        inputs = {}
        for name, rule in contract["sensors"].items():
            lead = (batch, count, int(data.dates[name]))
            pixels = size * contract["ratio"] if rule["grid"] == "hr" else size
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
