"""msGFM's training data: every batch holds images of one sensor, and of its pair where a place has both.

The sensors take turns in proportion to how many places have them (GFM's homogeneous batches). All of it is index
arithmetic on the step: which sensor, which places, which crop, so that a batch is a function of (configuration, seed,
step) for any number of processes and restarts. Several datasets, georeferenced or not, are mixed as if they were one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from skysense_jax.core.rngs import name_hash
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import geometry, views
from skysense_jax.sensors import NO_DATE, SENSORS

ENDLESS = 2**48
"""Samples in a stream: more than any run reads."""


class Dataset(NamedTuple):
    """One folder of places. first: number of its first place over all datasets; tile: base pixels; plans: by sensor,
    those of the contract that it holds."""

    places: dataset_records.Places
    first: int
    tile: int
    plans: dict[str, views.SensorPlan]


class Plan(NamedTuple):
    """Everything :func:`read` and :func:`sample` need. names: the contract's sensors, in order; members: sensor ->
    int32 [n, 2] (dataset, record) of its samples; shuffled: sensor -> endless stream of rows of `members`; turns:
    endless stream of (sensor, its batch in this round) as numbers counted through `rounds`; rounds: sensor -> batches
    in a round."""

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


def folders(cfg: Any) -> tuple[str, ...]:
    """The dataset folders of a run: config.data.dir and config.data.also."""
    return (str(cfg.data.dir), *(str(folder) for folder in cfg.data.also))


def check(cfg: Any, contract: Mapping[str, Any]) -> str:
    """The id of the datasets of a run. Raises ValueError where one has none of the contract's sensors, or a sensor is
    in none of them."""
    metas = [dataset_records.read_metadata(folder) for folder in folders(cfg)]
    held = set()
    for folder, meta in zip(folders(cfg), metas):
        if not (shared := set(meta["sensors"]) & set(contract["sensors"])):
            raise ValueError(
                f"the dataset in {folder} holds {', '.join(meta['sensors'])}, the model takes "
                f"{', '.join(contract['sensors'])}; leave the dataset out"
            )
        held |= shared
    for name, rule in contract["sensors"].items():
        if name not in held:
            raise ValueError(
                f"the model takes {name!r}, no dataset of config.data.dir and config.data.also holds it; "
                f"name those that the run takes (--config configs/msgfm_smoke.py:s2,s1), or add a dataset "
                f"that has {name!r}"
            )
        if unstored := [band for band in rule["bands"] if band in SENSORS[name].unstored]:
            raise ValueError(f"the model takes {unstored} of {name!r}, which records do not hold")
    return "+".join(str(meta["dataset_id"]) for meta in metas)


def make_plan(cfg: Any, contract: Mapping[str, Any], seed: int) -> Plan:
    """The plan of a run: opens the datasets and finds out which place has which sensor."""
    check(cfg, contract)
    names, data = tuple(contract["sensors"]), cfg.data
    datasets: list[Dataset] = []
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    first = 0
    for number, folder in enumerate(folders(cfg)):
        meta = dataset_records.read_metadata(folder)
        places = dataset_records.open_places(folder, data.split, int(data.max_bad_records))
        held = {"sensors": {name: contract["sensors"][name] for name in names if name in meta["sensors"]}}
        plans = views.sensor_plans(held, int(meta["ratio"]), dict.fromkeys(names, 1))
        datasets.append(Dataset(places, first, int(meta["tile"]), {plan.name: plan for plan in plans}))
        first += len(places)
        for name, has in dataset_records.holdings(folder, data.split, names, int(data.max_bad_records)).items():
            records = np.flatnonzero(has)
            found[name].append(np.stack([np.full_like(records, number), records], 1).astype(np.int32))
    members = {name: np.concatenate(parts) for name, parts in found.items()}
    if empty := [name for name in names if not len(members[name])]:
        raise ValueError(
            f"no place of split {data.split!r} has {', '.join(empty)}: name the sensors that the run "
            "takes (--config configs/msgfm_smoke.py:s2,s1)"
        )
    rounds = {name: max(1, round(len(rows) / data.batch)) for name, rows in members.items()}
    shuffled = {
        name: grain.MapDataset.range(len(rows)).seed(_seed(seed, name)).shuffle().repeat()
        for name, rows in members.items()
    }
    turns = grain.MapDataset.range(sum(rounds.values())).seed(_seed(seed, "turns")).shuffle().repeat()
    channels = max(len(rule["bands"]) for rule in contract["sensors"].values())
    return Plan(
        names,
        tuple(datasets),
        members,
        shuffled,
        turns,
        rounds,
        int(data.batch),
        int(cfg.model.img_size),
        channels,
        tuple(data.scale),
        tuple(data.aspect),
        float(data.flip),
    )


def _seed(seed: int, name: str) -> int:
    return (int(seed) + name_hash(name)) % 2**31


def draw(plan: Plan, step: int, row: int) -> tuple[str, int, int]:
    """(sensor, dataset, record) of one row of the batch of a step. A round is a shuffled list of each sensor's places,
    rounded to whole batches and at least one; the places of a sensor are all read once before any is read again.
    """
    length = sum(plan.rounds.values())
    turn = int(plan.turns[step])
    for name in plan.names:
        if turn < plan.rounds[name]:
            break
        turn -= plan.rounds[name]
    position = (step // length * plan.rounds[name] + turn) * plan.batch + row
    dataset, record = plan.members[name][int(plan.shuffled[name][position])]
    return name, int(dataset), int(record)


def read(plan: Plan, number: Any) -> tuple[str, int, Mapping[str, Any]]:
    """(sensor, dataset, the record itself) of row number % batch of step number // batch."""
    name, dataset, index = draw(plan, *divmod(int(number), plan.batch))
    return name, dataset, plan.datasets[dataset].places[index]


def sample(plan: Plan, drawn: tuple[str, int, Mapping[str, Any]], rng: np.random.Generator) -> dict[str, Any]:
    """The row that :func:`read` has drawn; the sensor's image and its pair's are cut by the same box."""
    name, dataset, record = drawn
    here = plan.datasets[dataset]
    box = geometry.sample_box(rng, here.tile, plan.scale, plan.aspect)
    turn = geometry.Orientation(bool(rng.random() < plan.flip), False, 0)
    own, pair = _empty(plan), _empty(plan)
    usable = views.usable(record, name)
    seen = None
    if len(usable):
        seen = int(rng.choice(usable))
        _cut(own, plan, here, name, record, seen, box, turn)
    partner = SENSORS[name].pair
    others = views.usable(record, partner) if partner in here.plans else ()
    paired = seen is not None and len(others) > 0
    if paired:
        other = nearest(rng, record[f"{name}_date"][seen], record[f"{partner}_date"], others)
        _cut(pair, plan, here, partner, record, other, box, turn)
    return {
        "sensor": np.int32(plan.names.index(name)),
        "own": own,
        "pair": pair,
        "paired": np.float32(paired),
        "place": {"index": np.int64(here.first + record["index"])},
    }


def nearest(rng: np.random.Generator, date: int, dates: np.ndarray, usable: np.ndarray) -> int:
    """The acquisition of `usable` whose date is nearest to `date`; any of them where that says nothing."""
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
    out: dict[str, np.ndarray],
    plan: Plan,
    here: Dataset,
    name: str,
    record: Mapping[str, Any],
    at: int,
    box: geometry.Box,
    turn: geometry.Orientation,
) -> None:
    """Acquisition `at` of a sensor inside the box, on the model's pixels, written into `out`."""
    p = here.plans[name]
    window = geometry.make_window(box, plan.side, p.per_base, here.tile * p.per_base)
    rows = slice(at, at + 1)
    planes, mask = geometry.resample(record[f"{name}_image"][rows], record[f"{name}_valid"][rows], p.bands, window)
    measured = record[f"{name}_measured"][at]
    out["bands"][: p.channels] = measured if p.bands is None else measured[p.bands]
    out["image"][..., : p.channels] = geometry.orient(planes, turn)[0].transpose(1, 2, 0) * out["bands"][: p.channels]
    out["valid"][:] = 1.0 if mask is None else geometry.orient(mask, turn)[0]


def stages(
    cfg: Any, contract: Mapping[str, Any], seed: int
) -> tuple[grain.MapDataset, Callable[[Any, np.random.Generator], dict[str, Any]]]:
    """As :func:`pipeline.stages`: the stream of what :func:`read` gives, and :func:`sample`."""
    plan = make_plan(cfg, contract, seed)
    drawn = grain.MapDataset.range(ENDLESS).map(functools.partial(read, plan)).seed(seed)
    return drawn, functools.partial(sample, plan)


def train_dataset(
    cfg: Any, contract: Mapping[str, Any], seed: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset:
    """As :func:`pipeline.train_dataset`: element [step] is one process's part of that step's `spec.sample_spec`."""
    drawn, make = stages(cfg, contract, seed)
    return views.shared(drawn.random_map(make), cfg, process_index, process_count)


def make_train_iterator(
    cfg: Any,
    contract: Mapping[str, Any],
    seed: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator:
    """As :func:`pipeline.make_train_iterator`, of one sensor's images a batch."""
    return views.read_ahead(train_dataset(cfg, contract, seed, process_index, process_count), cfg, start_step)
