"""Evaluation batches of every model: whole places as stored, with their labels; nothing is random."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from ml_collections import config_dict

from skysense_jax.core.trees import Tree
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import acquisitions, geometry, streams
from skysense_jax.data.batches.views import sensor_plans
from skysense_jax.sensors import Contract


def whole_place(record: dataset_records.Record, plans: Sequence[acquisitions.SensorPlan], tile: int) -> Tree:
    """One place's part of an evaluation batch: the whole tile as stored, nothing random.

    Where a sensor has more acquisitions than its plan's `dates`, the clearest of that many consecutive groups are taken
    (`geometry.spread_dates`).

    Args:
        record: the place's record.
        plans: how every sensor is read.
        tile: base pixels along the tile.

    Returns:
        {"sensors", "label", "label_map", "place"}, see :func:`eval_batches`, without the axis of places.
    """
    inputs = {}
    for sensor in plans:
        sensor_input = acquisitions.empty_input((sensor.dates,), tile * sensor.per_base, sensor.channels)
        usable, valid = acquisitions.usable(record, sensor.name), record[f"{sensor.name}_valid"]
        clear = (record[f"{sensor.name}_clear"][usable] * valid[usable]).mean(axis=(1, 2))
        chosen = geometry.spread_dates(usable, clear, sensor.dates)
        if len(chosen):
            image = record[f"{sensor.name}_image"][chosen] * valid[chosen][..., None]
            image = image if sensor.bands is None else image[..., sensor.bands]
            stack = acquisitions.stack_of(record, sensor, chosen, image, valid[chosen])
            acquisitions.fill(sensor_input, (), stack)
        sensor_input["dates"] = geometry.day_of_year(sensor_input["dates"])
        inputs[sensor.name] = sensor_input
    place = {**acquisitions.position(record), "name": np.array(dataset_records.as_text(record["place"]))}
    return {"sensors": inputs, "label": record["label"], "label_map": record["label_map"], "place": place}


def eval_batches(
    cfg: config_dict.ConfigDict,
    contract: Contract,
    split: str,
    batch: int,
    only: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Tree]:
    """Every place of a split once, in batches of a static size.

    Args:
        cfg: the whole configuration; `cfg.data` is read.
        contract: the model's input contract.
        split: name of the split.
        batch: places in a batch; the last batch is filled up by repeating its last place with weight 0.
        only: numbers of the places to read, in this order; None = all places in stored order.

    Yields:
        {"sensors": PlaceInput, "label" uint8 [B, K], "label_map" uint8 [B, N, N], "place": {"index", "lon", "lat",
        "name" (str)}, "weight" float32 [B]}.

    Raises:
        ValueError: as :func:`views.train_dataset`.
    """
    meta = dataset_records.read_metadata(cfg.data.dir)
    dataset_records.check_dataset(meta, contract, cfg)
    places = dataset_records.open_places(cfg.data.dir, split)
    chosen = range(len(places)) if only is None else only
    plans = sensor_plans(contract, contract["ratio"], cfg.data.eval_dates)
    element = functools.partial(whole_place, plans=plans, tile=int(meta["tile"]))
    filled = grain.MapDataset.range(0, -(-len(chosen) // batch) * batch)
    filled = filled.map(functools.partial(_clamped, places, chosen))
    iterator = iter(filled.map(element).batch(batch).to_iter_dataset(streams.read_options(cfg)))
    try:
        for first in range(0, len(chosen), batch):
            elements = next(iterator)
            yield {**elements, "weight": (np.arange(first, first + batch) < len(chosen)).astype(np.float32)}
    finally:
        iterator.close()


def _clamped(places: dataset_records.Places, chosen: Sequence[int] | np.ndarray, index: int) -> dataset_records.Record:
    """The record of place `chosen[index]`, of the last one where the index lies behind it."""
    return places[chosen[min(int(index), len(chosen) - 1)]]
