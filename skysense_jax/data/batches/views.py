"""From records to batches: every training batch is a function of (configuration, seed, step) and of nothing else.

grain keeps everything a random-access dataset until the batch: shuffle and repeat are index arithmetic and the
augmentation's generator belongs to the index in the global order. Processes take consecutive rows of the global batch,
so the local batches concatenated in process order are the batch of one process, whatever the number of processes and
threads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from skysense_jax import sensors
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import geometry, radiometry


class SensorPlan(NamedTuple):
    """How one sensor is read. bands: indices of the contract's bands in the record, None = all in order; per_base: its
    pixels per base pixel; count: acquisitions, at most, per training view or evaluated place."""

    name: str
    bands: np.ndarray | None
    per_base: int
    channels: int
    count: int


class ViewPlan(NamedTuple):
    """Views of one static shape. names: `radiometry.disturb`'s, one each; size: base pixels; scale: box area."""

    names: tuple[str, ...]
    size: int
    scale: tuple[float, float]


class Plan(NamedTuple):
    """Everything `sample_place` needs, as plain values: the configuration object is too slow for the hot loop."""

    sensors: tuple[SensorPlan, ...]
    views: dict[str, ViewPlan]
    tile: int
    aspect: tuple[float, float]
    flip: float
    rotate: float
    jitter: int
    augment: dict[str, Any]


def sensor_plans(contract: Mapping[str, Any], ratio: int, counts: Mapping[str, int]) -> tuple[SensorPlan, ...]:
    """One plan per sensor of the contract, in the contract's order. ratio: the dataset's; counts: acquisitions by
    sensor.
    """
    plans = []
    for name, rule in contract["sensors"].items():
        table = sensors.SENSORS[name].bands
        index = [table.index(band) for band in rule["bands"]]
        per_base = sensors.pixels_per_base(rule, ratio)
        bands = None if index == list(range(len(table))) else np.array(index)
        plans.append(SensorPlan(name, bands, per_base, len(index), int(counts[name])))
    return tuple(plans)


def make_plan(cfg: Any, contract: Mapping[str, Any], tile: int) -> Plan:
    """The plan of a training run over tiles of `tile` base pixels."""
    data = cfg.data
    views = {"global": ViewPlan(("global0", "global1"), int(data.global_size), tuple(data.global_scale))}
    if data.n_local:
        views["local"] = ViewPlan(("local",) * int(data.n_local), int(data.local_size), tuple(data.local_scale))
    return Plan(
        sensor_plans(contract, contract["ratio"], data.dates),
        views,
        tile,
        tuple(data.aspect),
        float(data.flip),
        float(data.rotate),
        int(data.date_jitter_days),
        data.augment.to_dict(),
    )


def sample_place(record: Mapping[str, Any], rng: np.random.Generator, plan: Plan) -> dict[str, Any]:
    """One place's part of a training batch (the leading axis is the view), all randomness from `rng`."""
    found = {p.name: usable(record, p.name) for p in plan.sensors}
    scopes = {scope: _sample_views(record, found, rng, plan, views) for scope, views in plan.views.items()}
    return {**scopes, "place": _place(record)}


def usable(record: Mapping[str, Any], name: str) -> np.ndarray:
    """Acquisitions with at least one valid pixel; a sensor that never saw the place has none."""
    return np.flatnonzero(record[f"{name}_valid"].any(axis=(1, 2)))


def _place(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"index": np.int64(record["index"]), "lon": np.float32(record["lon"]), "lat": np.float32(record["lat"])}


def _sample_views(
    record: Mapping[str, Any], found: Mapping[str, np.ndarray], rng: np.random.Generator, plan: Plan, views: ViewPlan
) -> dict[str, Any]:
    count, size = len(views.names), views.size
    inputs = {p.name: _empty((count, p.count), size * p.per_base, p.channels) for p in plan.sensors}
    coords, cell = np.empty((count, size, size, 2), np.float32), np.empty((count,), np.float32)
    for view, name in enumerate(views.names):
        box = geometry.sample_box(rng, plan.tile, views.scale, plan.aspect)
        turn = geometry.sample_orientation(rng, plan.flip, plan.rotate)
        coords[view], cell[view] = geometry.cell_centres(box, size, turn), geometry.cell_side(box, size)
        windows = {k: geometry.make_window(box, size * k, k, plan.tile * k) for k in {p.per_base for p in plan.sensors}}
        for p in plan.sensors:
            chosen = geometry.draw_dates(rng, found[p.name], p.count)
            if not len(chosen):
                continue
            image, valid = _pick(record, f"{p.name}_image", chosen), _pick(record, f"{p.name}_valid", chosen)
            planes, mask = geometry.resample(image, valid, p.bands, windows[p.per_base])
            planes = geometry.orient(radiometry.disturb(rng, p.name, planes, mask, name, plan.augment), turn)
            mask = 1.0 if mask is None else geometry.orient(mask, turn)
            _fill(inputs[p.name], (view,), p, record, chosen, planes.transpose(0, 2, 3, 1), mask)
    for one in inputs.values():
        one["dates"] = geometry.day_of_year(geometry.jitter_days(rng, one["dates"], plan.jitter))
    return {"sensors": inputs, "coords": coords, "cell": cell}


def _pick(record: Mapping[str, Any], key: str, chosen: np.ndarray) -> np.ndarray:
    """Rows `chosen` of a record's array, without a copy when it is one row (HR)."""
    array = record[key]
    return array[chosen[0] : chosen[0] + 1] if len(chosen) == 1 else array[chosen]


def _empty(lead: tuple[int, ...], pixels: int, channels: int) -> dict[str, np.ndarray]:
    """A SensorInput of padded dates: nothing valid, nothing measured, no date."""
    return {
        "image": np.zeros((*lead, pixels, pixels, channels), np.float32),
        "valid": np.zeros((*lead, pixels, pixels), np.float32),
        "bands": np.zeros((*lead, channels), np.float32),
        "dates": np.full(lead, -1, np.int32),
    }


def _fill(
    inputs: dict[str, np.ndarray],
    at: tuple[int, ...],
    plan: SensorPlan,
    record: Mapping[str, Any],
    chosen: np.ndarray,
    image: np.ndarray,
    valid: Any,
) -> None:
    """Writes the chosen acquisitions into the first rows of `inputs` at index `at`; dates still as days since 1970."""
    measured = record[f"{plan.name}_measured"][chosen]
    measured = measured if plan.bands is None else measured[:, plan.bands]
    rows = (*at, slice(0, len(chosen)))
    inputs["image"][rows] = image
    if not measured.all():
        inputs["image"][rows] *= measured[:, None, None, :]
    inputs["valid"][rows] = valid
    inputs["bands"][rows] = measured
    inputs["dates"][rows] = record[f"{plan.name}_date"][chosen]


def stages(
    cfg: Any, contract: Mapping[str, Any], seed: int
) -> tuple[grain.MapDataset, Callable[[Any, np.random.Generator], dict[str, Any]]]:
    """The two stages of a place's part of a batch: the endless stream of records in the order in which training reads
    them, and what makes the part of one, with the generator of its number. Raises as :func:`train_dataset`.
    """
    check(cfg, contract)
    plan = make_plan(cfg, contract, int(dataset_records.read_metadata(cfg.data.dir)["tile"]))
    places = dataset_records.open_places(cfg.data.dir, cfg.data.split, int(cfg.data.max_bad_records))
    return grain.MapDataset.source(places).seed(seed).shuffle().repeat(), functools.partial(_sample_place, plan)


def train_dataset(
    cfg: Any, contract: Mapping[str, Any], seed: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """The endless training data of one process: `train_dataset(...)[step]` is its part of that step's batch.

    Raises ValueError for a folder that is no dataset, a missing split, a dataset that does not fit the contract
    (`records.check_dataset`), or a batch that the processes cannot share evenly.
    """
    records, sample = stages(cfg, contract, seed)
    return shared(records.random_map(sample), cfg, process_index, process_count)


def shared(stream: grain.MapDataset, cfg: Any, process_index: int, process_count: int) -> grain.MapDataset:
    """One process's consecutive rows of every global batch of `stream`; ValueError where they are not equally many."""
    if cfg.data.batch < 1 or cfg.data.batch % process_count:
        raise ValueError(f"config.data.batch={cfg.data.batch} cannot be shared evenly by {process_count} processes")
    return stream.batch(cfg.data.batch // process_count, drop_remainder=True)[process_index::process_count]


def check(cfg: Any, contract: Mapping[str, Any]) -> str:
    """The id of a run's dataset; ValueError where dataset, contract and configuration do not fit
    (`records.check_dataset`).
    """
    meta = dataset_records.read_metadata(cfg.data.dir)
    dataset_records.check_georeferenced(meta, cfg.data.dir)
    dataset_records.check_dataset(meta, contract, cfg)
    return str(meta.get("dataset_id"))


def _sample_place(plan: Plan, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return sample_place(record, rng, plan)


def make_train_iterator(
    cfg: Any,
    contract: Mapping[str, Any],
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Local batches from `start_step` on, `config.data.prefetch` of them read ahead by `config.data.threads` threads.

    The position is the step and nothing else, on any number of processes. Call `.close()` when done with it.
    """
    return read_ahead(train_dataset(cfg, contract, seed, process_index, process_count), cfg, start_step)


def read_ahead(batches: grain.MapDataset, cfg: Any, start_step: int) -> grain.DatasetIterator:
    """The elements of `batches` from `start_step` on, read ahead as `config.data` says."""
    options = grain.ReadOptions(num_threads=int(cfg.data.threads), prefetch_buffer_size=int(cfg.data.prefetch))
    iterator = iter(batches.to_iter_dataset(options))
    iterator.set_state({"next_index": int(start_step)})
    return iterator


def train_batch(cfg: Any, contract: Mapping[str, Any], seed: int, step: int) -> dict[str, Any]:
    """The global batch of one step, read directly."""
    return train_dataset(cfg, contract, seed)[step]


def whole_place(record: Mapping[str, Any], plans: tuple[SensorPlan, ...], tile: int) -> dict[str, Any]:
    """One place's part of an evaluation batch: the whole tile as stored, nothing random.

    Of more acquisitions than the plan's `count` it takes the clearest of `count` consecutive groups
    (`geometry.spread_dates`).
    """
    inputs = {}
    for p in plans:
        inputs[p.name] = _empty((p.count,), tile * p.per_base, p.channels)
        found, valid = usable(record, p.name), record[f"{p.name}_valid"]
        clear = (record[f"{p.name}_clear"][found] * valid[found]).mean(axis=(1, 2))
        chosen = geometry.spread_dates(found, clear, p.count)
        if len(chosen):
            image = record[f"{p.name}_image"][chosen] * valid[chosen][..., None]
            image = image if p.bands is None else image[..., p.bands]
            _fill(inputs[p.name], (), p, record, chosen, image, valid[chosen])
        inputs[p.name]["dates"] = geometry.day_of_year(inputs[p.name]["dates"])
    name = record["place"]
    place = {**_place(record), "name": np.array(dataset_records.as_text(name))}
    return {"sensors": inputs, "label": record["label"], "label_map": record["label_map"], "place": place}


def eval_batches(
    cfg: Any, contract: Mapping[str, Any], split: str, batch: int, only: Sequence[int] | None = None
) -> Iterator[dict[str, Any]]:
    """Every place of `split` once, in stored order, in batches of the static size `batch`; or the places with the
    numbers `only`, in that order.

    Yields {"sensors": PlaceInput, "label" uint8 [B, K], "label_map" uint8 [B, N, N], "place": {"index", "lon", "lat",
    "name" (str)}, "weight" float32 [B]}: the last batch is filled up by repeating its last place with weight 0. Raises
    as `train_dataset`.
    """
    meta = dataset_records.read_metadata(cfg.data.dir)
    dataset_records.check_dataset(meta, contract, cfg)
    places = dataset_records.open_places(cfg.data.dir, split)
    chosen = range(len(places)) if only is None else only
    plans = sensor_plans(contract, contract["ratio"], cfg.data.eval_dates)
    rule = functools.partial(whole_place, plans=plans, tile=int(meta["tile"]))
    options = grain.ReadOptions(num_threads=int(cfg.data.threads), prefetch_buffer_size=int(cfg.data.prefetch))
    filled = grain.MapDataset.range(0, -(-len(chosen) // batch) * batch)
    filled = filled.map(functools.partial(_clamped, places, chosen))
    iterator = iter(filled.map(rule).batch(batch).to_iter_dataset(options))
    try:
        for first, elements in zip(range(0, len(chosen), batch), iterator):
            yield {**elements, "weight": (np.arange(first, first + batch) < len(chosen)).astype(np.float32)}
    finally:
        iterator.close()


def _clamped(places: dataset_records.Places, chosen: Sequence[int], index: int) -> dict[str, Any]:
    return places[chosen[min(int(index), len(chosen) - 1)]]
