"""SkySense's training batches: views of places with all their sensors (msGFM's are in `one_sensor`).

Every training batch is a function of (configuration, seed, step) and of nothing else. grain keeps everything a
random-access dataset until the batch: shuffle and repeat are index arithmetic, and the augmentation's generator belongs
to the index in the global order. Processes take consecutive rows of the global batch, so the local batches concatenated
in process order are the batch of a single process, whatever the number of processes and threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np
from ml_collections import config_dict

from skysense_jax import sensors
from skysense_jax.core.trees import Tree
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import acquisitions, geometry, radiometry, streams
from skysense_jax.data.batches.acquisitions import SensorPlan
from skysense_jax.data.records import Record


class ViewPlan(NamedTuple):
    """Views of one static shape.

    Attributes:
        names: name of every view, as `radiometry.disturb` takes it.
        size: base pixels along a view.
        scale: least and largest area of the box, as fractions of the tile.
    """

    names: tuple[str, ...]
    size: int
    scale: tuple[float, float]


class Plan(NamedTuple):
    """Everything that `sample_place` needs, as plain values: the configuration object is too slow for the hot loop.

    Attributes:
        sensors: how every sensor of the contract is read.
        views: "global" and, where the run has them, "local" -> the views.
        tile: base pixels along a tile.
        aspect: least and largest width / height of a box.
        flip, rotate: probabilities, see `geometry.sample_orientation`.
        jitter: days by which a date is moved, at most.
        augment: config.data.augment as plain values.
    """

    sensors: tuple[SensorPlan, ...]
    views: dict[str, ViewPlan]
    tile: int
    aspect: tuple[float, float]
    flip: float
    rotate: float
    jitter: int
    augment: dict[str, Any]


def sensor_plans(contract: sensors.Contract, ratio: int, counts: Mapping[str, int]) -> tuple[SensorPlan, ...]:
    """One plan per sensor of the contract, in the contract's order.

    Args:
        contract: the model's input contract (`sensors.input_contract`).
        ratio: the dataset's HR pixels along a base pixel.
        counts: sensor -> acquisitions, at most.

    Returns:
        The plans.
    """
    plans = []
    for name, rule in contract["sensors"].items():
        table = sensors.SENSORS[name].bands
        index = [table.index(band) for band in rule["bands"]]
        per_base = sensors.pixels_per_base(rule, ratio)
        bands = None if index == list(range(len(table))) else np.array(index)
        plans.append(SensorPlan(name, bands, per_base, len(index), int(counts[name])))
    return tuple(plans)


def make_plan(cfg: config_dict.ConfigDict, contract: sensors.Contract, tile: int) -> Plan:
    """The plan of a training run.

    Args:
        cfg: the whole configuration; `cfg.data` is read.
        contract: the model's input contract.
        tile: base pixels along the dataset's tiles.

    Returns:
        The plan.
    """
    data = cfg.data
    views = {"global": ViewPlan(("global0", "global1"), int(data.global_size), tuple(data.global_scale))}
    if data.n_local:
        views["local"] = ViewPlan(("local",) * int(data.n_local), int(data.local_size), tuple(data.local_scale))
    return Plan(
        sensors=sensor_plans(contract, contract["ratio"], data.dates),
        views=views,
        tile=tile,
        aspect=tuple(data.aspect),
        flip=float(data.flip),
        rotate=float(data.rotate),
        jitter=int(data.date_jitter_days),
        augment=data.augment.to_dict(),
    )


def sample_place(record: Record, rng: np.random.Generator, plan: Plan) -> Tree:
    """One place's part of a training batch; the leading axis is the view.

    Args:
        record: the place's record.
        rng: source of all randomness.
        plan: the run's plan.

    Returns:
        An element of the batch (`spec.views_spec` without the axis of places).
    """
    usable = {sensor.name: acquisitions.usable(record, sensor.name) for sensor in plan.sensors}
    scopes = {scope: _sample_views(record, usable, rng, plan, views) for scope, views in plan.views.items()}
    return {**scopes, "place": acquisitions.position(record)}


def _sample_views(
    record: Record, usable: Mapping[str, np.ndarray], rng: np.random.Generator, plan: Plan, views: ViewPlan
) -> Tree:
    """Views of one static shape. usable: sensor -> indices of its usable acquisitions."""
    count, size = len(views.names), views.size
    inputs = {
        sensor.name: acquisitions.empty_input((count, sensor.dates), size * sensor.per_base, sensor.channels)
        for sensor in plan.sensors
    }
    resolutions = {sensor.per_base for sensor in plan.sensors}
    coords, cell = np.empty((count, size, size, 2), np.float32), np.empty((count,), np.float32)
    for view, name in enumerate(views.names):
        box = geometry.sample_box(rng, plan.tile, views.scale, plan.aspect)
        turn = geometry.sample_orientation(rng, plan.flip, plan.rotate)
        coords[view], cell[view] = geometry.cell_centres(box, size, turn), geometry.cell_side(box, size)
        windows = {k: geometry.make_window(box, size * k, k, plan.tile * k) for k in resolutions}
        for sensor in plan.sensors:
            chosen = geometry.draw_dates(rng, usable[sensor.name], sensor.dates)
            if not len(chosen):
                continue
            image = acquisitions.pick(record, f"{sensor.name}_image", chosen)
            valid = acquisitions.pick(record, f"{sensor.name}_valid", chosen)
            planes, mask = geometry.resample(image, valid, sensor.bands, windows[sensor.per_base])
            planes = geometry.orient(radiometry.disturb(rng, sensor.name, planes, mask, name, plan.augment), turn)
            turned_mask = 1.0 if mask is None else geometry.orient(mask, turn)
            stack = acquisitions.stack_of(record, sensor, chosen, planes.transpose(0, 2, 3, 1), turned_mask)
            acquisitions.fill(inputs[sensor.name], (view,), stack)
    for sensor_input in inputs.values():
        sensor_input["dates"] = geometry.day_of_year(geometry.jitter_days(rng, sensor_input["dates"], plan.jitter))
    return {"sensors": inputs, "coords": coords, "cell": cell}


def stages(
    cfg: config_dict.ConfigDict, contract: sensors.Contract, seed: int
) -> tuple[grain.MapDataset, Callable[[Record, np.random.Generator], Tree]]:
    """The two stages of an element of a batch, which `data bench` times one by one.

    Args:
        cfg: the whole configuration.
        contract: the model's input contract.
        seed: seed of the order and of all augmentation.

    Returns:
        (endless stream of records in the order in which training reads them, function that makes the element of a
        record with the generator of its number).

    Raises:
        ValueError: as :func:`train_dataset`.
    """
    check(cfg, contract)
    plan = make_plan(cfg, contract, int(dataset_records.read_metadata(cfg.data.dir)["tile"]))
    places = dataset_records.open_places(cfg.data.dir, cfg.data.split, int(cfg.data.max_bad_records))
    return grain.MapDataset.source(places).seed(seed).shuffle().repeat(), functools.partial(_sample_place, plan)


def train_dataset(
    cfg: config_dict.ConfigDict, contract: sensors.Contract, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """The endless training data of one process.

    Args:
        cfg: the whole configuration.
        contract: the model's input contract.
        seed: seed of the order and of all augmentation.
        process_index: number of this process.
        process_count: number of processes.

    Returns:
        A dataset whose element [step] is the process's part of that step's batch (`spec.views_spec`).

    Raises:
        ValueError: the folder is no dataset, the split is missing, the dataset does not fit the contract
            (`records.check_dataset`), or the processes cannot share the batch evenly.
    """
    records, sample = stages(cfg, contract, seed)
    return streams.shared(records.random_map(sample), cfg, process_index, process_count)


def check(cfg: config_dict.ConfigDict, contract: sensors.Contract) -> str:
    """Checks that a run's dataset fits.

    Args:
        cfg: the whole configuration.
        contract: the model's input contract.

    Returns:
        The id of the dataset.

    Raises:
        ValueError: dataset, contract and configuration do not fit together (`records.check_dataset`).
    """
    meta = dataset_records.read_metadata(cfg.data.dir)
    dataset_records.check_georeferenced(meta, cfg.data.dir)
    dataset_records.check_dataset(meta, contract, cfg)
    return str(meta.get("dataset_id"))


def _sample_place(plan: Plan, record: Record, rng: np.random.Generator) -> Tree:
    return sample_place(record, rng, plan)


def make_train_iterator(
    cfg: config_dict.ConfigDict,
    contract: sensors.Contract,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over the training batches of one process.

    The position is the step and nothing else, on any number of processes. Call `.close()` when done with it.

    Args:
        cfg: the whole configuration.
        contract: the model's input contract.
        seed: seed of the order and of all augmentation.
        start_step: step of the first batch.
        process_index: number of this process.
        process_count: number of processes.

    Returns:
        Local batches, `config.data.prefetch` of them read ahead by `config.data.threads` threads.
    """
    return streams.read_ahead(train_dataset(cfg, contract, seed, process_index, process_count), cfg, start_step)


def train_batch(cfg: config_dict.ConfigDict, contract: sensors.Contract, seed: int, step: int) -> Tree:
    """The global batch of one step, read directly.

    Args:
        cfg: the whole configuration.
        contract: the model's input contract.
        seed: seed of the order and of all augmentation.
        step: the step.

    Returns:
        The batch (`spec.views_spec`).
    """
    return train_dataset(cfg, contract, seed)[step]
