"""What frozen features of a trained network are worth, beside two baselines, with intervals over places.

The network is fixed before it sees a label: the teacher of the run (or the weights of an export). The dataset's split
"train" fits kNN and linear probe and chooses its regularisation, the split "test" (other places) is only scored. The
same rows are scored for the same network untrained (same architecture, normalisation and seed of the run) and for
per-band statistics of the images.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import config_dict
from tqdm import tqdm

from skysense_jax import networks
from skysense_jax.core.trees import Tree
from skysense_jax.data import records
from skysense_jax.data.batches import whole_places
from skysense_jax.evals import baselines, compare, region, rows
from skysense_jax.evals.unit import unit
from skysense_jax.models import skysense, systems
from skysense_jax.models.inputs import PLACE
from skysense_jax.ops import regions
from skysense_jax.run.folder import commit
from skysense_jax.sensors import Contract

Arrays = Mapping[str, Any]
"""A PlaceInput with batch axis."""


def evaluate(
    path: str,
    data: str,
    *,
    task: str = "all",
    features: str = "fused",
    seed: int = 0,
    config: config_dict.ConfigDict | None = None,
    bank: str = networks.OWN_BANK,
) -> dict[str, Any]:
    """Scores a trained network's frozen features beside two baselines.

    Args:
        path: workdir, checkpoint or export.
        data: dataset folder.
        task: "scene" (labels of places), "patch" (patches of the label map) or "all" (those with labels).
        features: "fused", or the name of a sensor.
        seed: of the bootstrap.
        config: whose data.eval_dates and eval section are used instead of the run's.
        bank: prototype bank of a network with geo-context, as `networks.open_network`.

    Returns:
        The report, JSON-able; see `evals.compare.compare` for "tasks".

    Raises:
        ValueError: network and dataset do not fit, or the dataset has no labels for the task.
    """
    started = time.monotonic()
    description = networks.read_description(path)
    meta = records.read_metadata(data)
    if systems.system_of(description.model).encodes_sensors_alone:  # any sensors will do; a fused map needs all of them
        shared = {name: rule for name, rule in description.contract["sensors"].items() if name in meta["sensors"]}
        description = description._replace(contract={**description.contract, "sensors": shared})
    else:
        records.check_georeferenced(meta, data)
    cfg, contract = settings(description, config, data), description.contract
    records.check_dataset(meta, contract, cfg)
    tasks, sensor = _tasks(meta, task), _sensor(contract, features)
    methods = network_methods(
        networks.open_network(path, bank), tasks, sensor, tile=int(meta["tile"]), patch=int(cfg.eval.patch)
    )
    methods["statistics"] = _statistics(tasks, sensor, tile=int(meta["tile"]), patch=int(cfg.eval.patch))
    labelled = {split: _collect(cfg, contract, split, methods, tasks, sensor) for split in ("train", "test")}
    result = {}
    for name in tasks:
        result[name] = compare.compare(
            labelled["train"][name],
            labelled["test"][name],
            k=int(cfg.eval.knn_k),
            temperature=float(cfg.eval.knn_temp),
            resamples=int(cfg.eval.bootstrap),
            seed=seed,
        )
        result[name]["class_names"] = _class_names(meta, name, result[name]["classes"])
    return {
        "network": {"path": str(path), "kind": description.kind, "step": description.step},
        "dataset": {"dir": str(data), "dataset_id": meta.get("dataset_id"), "synthetic": bool(meta.get("synthetic"))},
        "features": features,
        "bank": bank if networks.has_bank(description) else networks.NO_BANK,
        "seed": seed,
        "commit": commit(),
        "eval": cfg.eval.to_dict(),
        "eval_dates": cfg.data.eval_dates.to_dict(),
        "tasks": result,
        "seconds": round(time.monotonic() - started, 1),
    }


def _tasks(meta: Mapping[str, Any], task: str) -> tuple[str, ...]:
    """The tasks to score: those with labels where all are asked for."""
    has = {"scene": bool(meta.get("label_classes")), "patch": bool(meta.get("label_map_classes"))}
    if task == "all":
        labelled = tuple(name for name in rows.TASKS if has[name])
        if not labelled:
            raise ValueError("the dataset has neither scene labels nor a label map: nothing to score features against")
        return labelled
    if not has[task]:
        raise ValueError(
            f"--task {task}: the dataset has no {'scene labels' if task == 'scene' else 'label map'}; "
            f"it has {', '.join(name for name in rows.TASKS if has[name]) or 'no labels at all'}"
        )
    return (task,)


def settings(
    description: networks.Description, config: config_dict.ConfigDict | None, data: str
) -> config_dict.ConfigDict:
    """The run's configuration with another dataset, and with the evaluation settings of another configuration.

    Args:
        description: of the network.
        config: whose data.eval_dates and eval section are used; None: the run's.
        data: dataset folder.

    Returns:
        The whole configuration.

    Raises:
        ValueError: neither the network's folder nor the caller has a configuration.
    """
    base = description.config if description.config is not None else config
    if base is None:
        raise ValueError(
            f"{description.path} does not say how it was trained: give --config FILE for the evaluation's settings"
        )
    cfg = base.copy_and_resolve_references()
    cfg.unlock()
    if config is not None:
        cfg.eval, cfg.data.eval_dates = config.eval, config.data.eval_dates
    cfg.model = description.model
    cfg.data.bands = {name: tuple(rule["bands"]) for name, rule in description.contract["sensors"].items()}
    cfg.data.dir = str(data)
    return cfg


def _sensor(contract: Contract, features: str) -> str | None:
    """The sensor whose features are scored; None for the fused ones."""
    if features == "fused":
        return None
    if features not in contract["sensors"]:
        raise ValueError(f"--features {features}: the network gives fused, {', '.join(contract['sensors'])}")
    return features


def network_methods(
    network: networks.Network, tasks: tuple[str, ...], sensor: str | None, *, tile: int, patch: int
) -> dict[str, rows.Method]:
    """The trained network and the same network untrained as evaluation methods, with one compiled program for both.

    Args:
        network: with its weights.
        tasks: to score, of rows.TASKS.
        sensor: whose features are scored; None: the fused ones.
        tile: side of a place, base pixels.
        patch: side of a patch, base pixels.

    Returns:
        "trained" and "untrained" -> method.
    """
    prefix = "" if sensor is None else f"{sensor}_"
    outputs = {"scene": f"{prefix}image", "patch": f"{prefix}pixel"}

    @jax.jit
    def forward(encoder: Tree, inputs: Arrays) -> dict[str, jax.Array]:
        out = network.features(encoder, inputs)
        return {task: out[outputs[task]] for task in tasks}

    def method(encoder: Tree) -> rows.Method:
        def features(inputs: Arrays) -> dict[str, np.ndarray]:
            out = {task: np.asarray(value) for task, value in forward(encoder, inputs).items()}
            return {
                task: value if task == "scene" else rows.patch_means(value, patch, tile) for task, value in out.items()
            }

        return features

    encoder = jax.tree.map(jax.numpy.asarray, network.encoder)  # to the device once, not with every batch
    return {"trained": method(encoder), "untrained": method(networks.untrained(network.description))}


def _statistics(tasks: tuple[str, ...], sensor: str | None, *, tile: int, patch: int) -> rows.Method:
    """The baseline of per-band statistics; of one sensor where only its features are scored."""

    def features(inputs: Arrays) -> dict[str, np.ndarray]:
        scored = {
            name: arrays for name, arrays in inputs.items() if name == sensor or (sensor is None and name != PLACE)
        }
        return {
            task: baselines.image_statistics(scored, tile=tile, patch=patch if task == "patch" else None)
            for task in tasks
        }

    return features


def _collect(
    cfg: config_dict.ConfigDict,
    contract: Contract,
    split: str,
    methods: Mapping[str, rows.Method],
    tasks: tuple[str, ...],
    needs: str | None,
) -> dict[str, rows.Rows]:
    """Features and labels of all places of a split, by task; with `needs` only places that have that sensor."""
    size = int(cfg.eval.batch)
    total = -(-len(records.open_places(cfg.data.dir, split)) // size)
    batches = tqdm(
        whole_places.eval_batches(cfg, contract, split, size),
        total=total,
        desc=f"features, {split} places",
        unit="batch",
    )
    return rows.collect(batches, methods, tasks, patch=int(cfg.eval.patch), needs=needs)


def _class_names(meta: Mapping[str, Any], task: str, classes: list[int]) -> list[str]:
    """Names of a task's classes, in the order of `classes`."""
    if task == "scene":
        return [meta["label_classes"][index] for index in classes]
    return [meta["label_map_classes"].get(str(index), str(index)) for index in classes]


def places_in_region(
    network: networks.Network, bank: Mapping[str, np.ndarray], cfg: config_dict.ConfigDict, row: int
) -> region.Seen:
    """Encodes the places of a dataset that lie in a region.

    Args:
        network: with its weights.
        bank: its prototype bank.
        cfg: of :func:`settings`; its dataset is read.
        row: of the bank, the region.

    Returns:
        The places in the bank's space.

    Raises:
        ValueError: the dataset has no place in the region, or is not georeferenced.
    """
    description = network.description
    records.check_georeferenced(records.read_metadata(cfg.data.dir), cfg.data.dir)
    model, size = skysense.make_model(description.model, description.contract), int(cfg.eval.batch)
    width, side = description.model.fusion.embed_dims, skysense.region_side(description.model.geo_context)

    @jax.jit
    def forward(encoder: Tree, inputs: Arrays) -> tuple[jax.Array, jax.Array]:
        out = model.apply(encoder, inputs)
        return model.query(encoder, out["fused"][..., :width]), out["fused_mask"]

    encoder = jax.tree.map(jax.numpy.asarray, skysense.with_bank(network.encoder, None))  # to the device once
    encoded: list[dict[str, Any]] = []
    for split in records.splits(cfg.data.dir):
        lon, lat = records.locations(cfg.data.dir, split)
        ids = regions.cell_ids(lon, lat, bank["lon_edges"], bank["lat_edges"], side)
        chosen = np.flatnonzero(ids == bank["cells"][row])
        batches = whole_places.eval_batches(cfg, description.contract, split, size, chosen.tolist())
        for batch in tqdm(batches, total=-(-len(chosen) // size), desc=f"places of the region, {split}", unit="batch"):
            real = batch["weight"] > 0
            query, mask = (np.asarray(output)[real] for output in forward(encoder, batch["sensors"]))
            encoded.append(
                {
                    "query": unit(query).astype(np.float32),
                    "mask": mask > 0,
                    "label": batch["label_map"][real],
                    "names": batch["place"]["name"][real],
                    "lon": batch["place"]["lon"][real],
                    "lat": batch["place"]["lat"][real],
                }
            )
    if not encoded:
        raise ValueError(f"{cfg.data.dir} has no place in this region")
    joined = {name: np.concatenate([batch[name] for batch in encoded]) for name in encoded[0]}
    count, grid = len(joined["mask"]), joined["mask"].shape[1:]
    return region.Seen(
        joined["query"].reshape(count, grid[0] * grid[1], -1),
        joined["mask"].reshape(count, -1),
        joined["label"].reshape(count, -1),
        [str(name) for name in joined["names"]],
        joined["lon"],
        joined["lat"],
        grid,
    )
