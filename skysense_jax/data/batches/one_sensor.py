"""msGFM's training batches: images of one sensor, and of its pair where a place has both (SkySense's are in `views`).

The sensors take turns in proportion to how many places have them (GFM's homogeneous batches). The sensor, the places
and the crops of a batch follow from the step by index arithmetic, so that a batch is a function of (configuration,
seed, step) for any number of processes and restarts. Several datasets, georeferenced or not, are mixed as if they were
a single dataset.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import grain
import numpy as np
from ml_collections import config_dict

from skysense_jax.core.rngs import name_hash
from skysense_jax.core.trees import Tree
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import acquisitions, geometry, streams, views
from skysense_jax.sensors import NO_DATE, SENSORS, Contract

ENDLESS = 2**48
"""Samples in a stream: more than any run reads."""


class Dataset(NamedTuple):
    """One folder of places.

    Attributes:
        places: its records.
        first: number of its first place over all datasets.
        tile: base pixels along a tile.
        plans: sensor -> how it is read, for the contract's sensors that the folder holds.
    """

    places: dataset_records.Places
    first: int
    tile: int
    plans: dict[str, acquisitions.SensorPlan]


Drawn = tuple[str, int, dataset_records.Record]
"""(sensor, number of the dataset, record) of a sample."""


class Plan(NamedTuple):
    """Everything that :func:`read` and :func:`sample` need.

    Attributes:
        names: the contract's sensors, in order.
        datasets: the run's datasets.
        members: sensor -> int32 [n, 2] (dataset, record) of its samples.
        shuffled: sensor -> endless stream of rows of `members`.
        turns: endless stream of turns; a turn is the number of a batch within a round, counted through `rounds`.
        rounds: sensor -> batches in a round.
        batch: samples in a batch.
        side: pixels along an image.
        channels: bands of the contract's widest sensor.
        scale: least and largest area of a crop, as fractions of the tile.
        aspect: least and largest width / height of a crop.
        flip: probability of the horizontal flip.
    """

    names: tuple[str, ...]
    datasets: tuple[Dataset, ...]
    members: dict[str, np.ndarray]
    shuffled: dict[str, grain.MapDataset]
    turns: grain.MapDataset
    rounds: dict[str, int]
    batch: int
    side: int
    channels: int
    scale: tuple[float, float]
    aspect: tuple[float, float]
    flip: float


class _View(NamedTuple):
    """A crop that a sensor and its pair share. tile: base pixels along the tile; side: pixels along the image."""

    box: geometry.Box
    orientation: geometry.Orientation
    tile: int
    side: int


def folders(cfg: config_dict.ConfigDict) -> tuple[str, ...]:
    """The dataset folders of a run: config.data.dir and config.data.also."""
    return (str(cfg.data.dir), *(str(folder) for folder in cfg.data.also))


def check(cfg: config_dict.ConfigDict, contract: Contract) -> str:
    """Checks that the datasets of a run fit.

    Args:
        cfg: the whole configuration; `cfg.data` is read.
        contract: the model's input contract.

    Returns:
        The id of the datasets: their ids joined by "+".

    Raises:
        ValueError: a dataset has none of the contract's sensors, or a sensor is in none of the datasets.
    """
    metas = [dataset_records.read_metadata(folder) for folder in folders(cfg)]
    stored = set()
    for folder, meta in zip(folders(cfg), metas, strict=True):
        if not (common := set(meta["sensors"]) & set(contract["sensors"])):
            raise ValueError(
                f"the dataset in {folder} holds {', '.join(meta['sensors'])}, the model takes "
                f"{', '.join(contract['sensors'])}; leave the dataset out"
            )
        stored |= common
    for name, rule in contract["sensors"].items():
        if name not in stored:
            raise ValueError(
                f"the model takes {name!r}, no dataset of config.data.dir and config.data.also holds it; name those "
                f"that the run takes (--config configs/msgfm_smoke.py:s2,s1), or add a dataset that has {name!r}"
            )
        if unstored := [band for band in rule["bands"] if band in SENSORS[name].unstored]:
            raise ValueError(f"the model takes {unstored} of {name!r}, which records do not hold")
    return "+".join(str(meta["dataset_id"]) for meta in metas)


def make_plan(cfg: config_dict.ConfigDict, contract: Contract, seed: int) -> Plan:
    """The plan of a run: opens the datasets and finds out which place has which sensor.

    Args:
        cfg: the whole configuration; `cfg.data` and `cfg.model.img_size` are read.
        contract: the model's input contract.
        seed: seed of the order.

    Returns:
        The plan.

    Raises:
        ValueError: as :func:`check`; a folder is no dataset, or no place of the split has a sensor.
    """
    check(cfg, contract)
    names, data = tuple(contract["sensors"]), cfg.data
    datasets: list[Dataset] = []
    samples: dict[str, list[np.ndarray]] = {name: [] for name in names}
    first = 0
    for number, folder in enumerate(folders(cfg)):
        meta = dataset_records.read_metadata(folder)
        places = dataset_records.open_places(folder, data.split, int(data.max_bad_records))
        common = {"sensors": {name: contract["sensors"][name] for name in names if name in meta["sensors"]}}
        plans = views.sensor_plans(common, int(meta["ratio"]), dict.fromkeys(names, 1))
        datasets.append(Dataset(places, first, int(meta["tile"]), {plan.name: plan for plan in plans}))
        first += len(places)
        for name, has in dataset_records.holdings(folder, data.split, names, int(data.max_bad_records)).items():
            records = np.flatnonzero(has)
            samples[name].append(np.stack([np.full_like(records, number), records], 1).astype(np.int32))
    members = {name: np.concatenate(of_dataset) for name, of_dataset in samples.items()}
    if empty := [name for name in names if not len(members[name])]:
        raise ValueError(
            f"no place of split {data.split!r} has {', '.join(empty)}: name the sensors that the run takes "
            "(--config configs/msgfm_smoke.py:s2,s1)"
        )
    rounds = {name: max(1, round(len(rows) / data.batch)) for name, rows in members.items()}
    shuffled = {
        name: grain.MapDataset.range(len(rows)).seed(_seed(seed, name)).shuffle().repeat()
        for name, rows in members.items()
    }
    turns = grain.MapDataset.range(sum(rounds.values())).seed(_seed(seed, "turns")).shuffle().repeat()
    channels = max(len(rule["bands"]) for rule in contract["sensors"].values())
    return Plan(
        names=names,
        datasets=tuple(datasets),
        members=members,
        shuffled=shuffled,
        turns=turns,
        rounds=rounds,
        batch=int(data.batch),
        side=int(cfg.model.img_size),
        channels=channels,
        scale=tuple(data.scale),
        aspect=tuple(data.aspect),
        flip=float(data.flip),
    )


def _seed(seed: int, name: str) -> int:
    return (int(seed) + name_hash(name)) % 2**31


def draw(plan: Plan, step: int, row: int) -> tuple[str, int, int]:
    """Which sample a row of a batch is.

    A round is a shuffled list of each sensor's places, rounded to whole batches and at least one; the places of a
    sensor are all read once before any is read again.

    Args:
        plan: the run's plan.
        step: the step.
        row: number of the sample in the step's global batch.

    Returns:
        (sensor, number of the dataset, number of the record).
    """
    length = sum(plan.rounds.values())
    name, batch = _batch_of_turn(plan, int(plan.turns[step]))
    position = (step // length * plan.rounds[name] + batch) * plan.batch + row
    dataset, record = plan.members[name][int(plan.shuffled[name][position])]
    return name, int(dataset), int(record)


def _batch_of_turn(plan: Plan, turn: int) -> tuple[str, int]:
    """(sensor, number of the batch among the sensor's batches of a round) of a turn."""
    for name in plan.names:
        if turn < plan.rounds[name]:
            return name, turn
        turn -= plan.rounds[name]
    raise ValueError("the turn lies behind the end of a round")


def read(plan: Plan, number: int) -> Drawn:
    """Reads the record of row number % batch of step number // batch.

    Args:
        plan: the run's plan.
        number: number of the sample over all batches.

    Returns:
        (sensor, number of the dataset, record).
    """
    name, dataset, index = draw(plan, *divmod(int(number), plan.batch))
    return name, dataset, plan.datasets[dataset].places[index]


def sample(plan: Plan, drawn: Drawn, rng: np.random.Generator) -> Tree:
    """The row of a batch; the sensor's image and the image of its pair are cut by the same box.

    Args:
        plan: the run's plan.
        drawn: (sensor, number of the dataset, record), see :func:`read`.
        rng: source of all randomness.

    Returns:
        An element of the batch (`spec.one_sensor_spec` without the axis of samples).
    """
    name, number, record = drawn
    dataset = plan.datasets[number]
    box = geometry.sample_box(rng, dataset.tile, plan.scale, plan.aspect)
    flip = geometry.Orientation(bool(rng.random() < plan.flip), False, 0)
    view = _View(box, flip, dataset.tile, plan.side)
    image, pair_image, paired = _empty(plan), _empty(plan), False
    usable = acquisitions.usable(record, name)
    if len(usable):
        acquisition = int(rng.choice(usable))
        _cut(image, dataset.plans[name], record, acquisition, view)
        pair = SENSORS[name].pair
        candidates = acquisitions.usable(record, pair) if pair in dataset.plans else usable[:0]
        paired = len(candidates) > 0
        if paired:
            date, dates = record[f"{name}_date"][acquisition], record[f"{pair}_date"]
            _cut(pair_image, dataset.plans[pair], record, nearest(rng, date, dates, candidates), view)
    return {
        "sensor": np.int32(plan.names.index(name)),
        "own": image,
        "pair": pair_image,
        "paired": np.float32(paired),
        "place": {"index": np.int64(dataset.first + record["index"])},
    }


def nearest(rng: np.random.Generator, date: int, dates: np.ndarray, usable: np.ndarray) -> int:
    """The acquisition whose date is nearest to a date; a random one where the dates say nothing.

    Args:
        rng: source of all randomness.
        date: days since 1970-01-01, or NO_DATE.
        dates: [T] days of the record's acquisitions; NO_DATE where unknown.
        usable: indices of the acquisitions to choose from.

    Returns:
        Index of the acquisition.
    """
    known = usable[dates[usable] != NO_DATE]
    if date == NO_DATE or not len(known):
        return int(rng.choice(usable))
    return int(known[np.argmin(np.abs(dates[known] - date))])


def _empty(plan: Plan) -> dict[str, np.ndarray]:
    return {
        "image": np.zeros((plan.side, plan.side, plan.channels), np.float32),
        "valid": np.zeros((plan.side, plan.side), np.float32),
        "bands": np.zeros(plan.channels, np.float32),
    }


def _cut(
    image: dict[str, np.ndarray],
    sensor: acquisitions.SensorPlan,
    record: dataset_records.Record,
    acquisition: int,
    view: _View,
) -> None:
    """Writes one acquisition of a sensor inside a view, on the model's pixels, into `image`."""
    window = geometry.make_window(view.box, view.side, sensor.per_base, view.tile * sensor.per_base)
    dates, channels = slice(acquisition, acquisition + 1), sensor.channels
    stack, valid = record[f"{sensor.name}_image"][dates], record[f"{sensor.name}_valid"][dates]
    planes, mask = geometry.resample(stack, valid, sensor.bands, window)
    measured = record[f"{sensor.name}_measured"][acquisition]
    bands = image["bands"]
    bands[:channels] = measured if sensor.bands is None else measured[sensor.bands]
    turned = geometry.orient(planes, view.orientation)[0].transpose(1, 2, 0)
    image["image"][..., :channels] = turned * bands[:channels]
    image["valid"][:] = 1.0 if mask is None else geometry.orient(mask, view.orientation)[0]


def stages(
    cfg: config_dict.ConfigDict, contract: Contract, seed: int
) -> tuple[grain.MapDataset, Callable[[Drawn, np.random.Generator], Tree]]:
    """The two stages of an element of a batch, as :func:`views.stages`.

    Args:
        cfg: the whole configuration.
        contract: the model's input contract.
        seed: seed of the order and of all augmentation.

    Returns:
        (endless stream of the results of :func:`read`, function that makes the element of such a result with the
        generator of its number: :func:`sample`).
    """
    plan = make_plan(cfg, contract, seed)
    drawn = grain.MapDataset.range(ENDLESS).map(functools.partial(read, plan)).seed(seed)
    return drawn, functools.partial(sample, plan)


def train_dataset(
    cfg: config_dict.ConfigDict, contract: Contract, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """The endless training data of one process, as :func:`views.train_dataset`.

    Args:
        cfg: the whole configuration.
        contract: the model's input contract.
        seed: seed of the order and of all augmentation.
        process_index: number of this process.
        process_count: number of processes.

    Returns:
        A dataset whose element [step] is the process's part of that step's batch (`spec.one_sensor_spec`).

    Raises:
        ValueError: as :func:`make_plan`, or the processes cannot share the batch evenly.
    """
    drawn, element = stages(cfg, contract, seed)
    return streams.shared(drawn.random_map(element), cfg, process_index, process_count)


def make_train_iterator(
    cfg: config_dict.ConfigDict,
    contract: Contract,
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over the training batches of one process, as :func:`views.make_train_iterator`.

    Args:
        cfg: the whole configuration.
        contract: the model's input contract.
        seed: seed of the order and of all augmentation.
        start_step: step of the first batch.
        process_index: number of this process.
        process_count: number of processes.

    Returns:
        Local batches, read ahead; call `.close()` when done with them.
    """
    return streams.read_ahead(train_dataset(cfg, contract, seed, process_index, process_count), cfg, start_step)
