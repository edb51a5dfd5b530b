"""`skysense-jax eval`: what frozen features of a trained network are worth, beside two baselines, with intervals over
places.

The network is fixed before it sees a label: the teacher of the run (or the weights of an export). The dataset's split
"train" fits kNN and linear probe and chooses its regularisation, the split "test" (other places) is only scored. The
same rows are scored for the same network untrained (same architecture, normalisation and seed of the run) and for
per-band statistics of the images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from skysense_jax import networks
from skysense_jax.data import records
from skysense_jax.data.batches import views
from skysense_jax.evals import baselines, compare, region, rows
from skysense_jax.evals.unit import unit
from skysense_jax.models import skysense, systems
from skysense_jax.models.inputs import PLACE
from skysense_jax.ops import regions
from skysense_jax.run.folder import commit

Arrays = Mapping[str, Any]


def evaluate(
    path: str,
    data: str,
    *,
    task: str = "all",
    features: str = "fused",
    seed: int = 0,
    config: Any = None,
    bank: str = networks.OWN_BANK,
) -> dict[str, Any]:
    """The evaluation as a JSON-able dict; see `evals.compare.compare` for "tasks".

    path: workdir, checkpoint or export. data: dataset folder. task, features, seed, bank: as the command's options.
    Raises ValueError where network and dataset do not fit, or the dataset has no labels for the task.
    """
    started = time.monotonic()
    found = networks.read_description(path)
    meta = records.read_metadata(data)
    if systems.system_of(found.model).encodes_sensors_alone:  # any sensors will do; a fused map wants every one
        held = {name: rule for name, rule in found.contract["sensors"].items() if name in meta["sensors"]}
        found = found._replace(contract={**found.contract, "sensors": held})
    else:
        records.check_georeferenced(meta, data)
    cfg, contract = settings(found, config, data), found.contract
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
        "network": {"path": str(path), "kind": found.kind, "step": found.step},
        "dataset": {"dir": str(data), "dataset_id": meta.get("dataset_id"), "synthetic": bool(meta.get("synthetic"))},
        "features": features,
        "bank": bank if networks.has_bank(found) else networks.NO_BANK,
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
        chosen = tuple(name for name in rows.TASKS if has[name])
        if not chosen:
            raise ValueError("the dataset has neither scene labels nor a label map: nothing to score features against")
        return chosen
    if not has[task]:
        raise ValueError(
            f"--task {task}: the dataset has no {'scene labels' if task == 'scene' else 'label map'}; "
            f"it has {', '.join(name for name in rows.TASKS if has[name]) or 'no labels at all'}"
        )
    return (task,)


def settings(found: networks.Description, config: Any, data: str) -> Any:
    """The run's configuration with this dataset, and with the evaluation settings of `config` where one is given."""
    base = found.config if found.config is not None else config
    if base is None:
        raise ValueError(
            f"{found.path} does not say how it was trained: give --config FILE for the evaluation's settings"
        )
    cfg = base.copy_and_resolve_references()
    cfg.unlock()
    if config is not None:
        cfg.eval, cfg.data.eval_dates = config.eval, config.data.eval_dates
    cfg.model = found.model
    cfg.data.bands = {name: tuple(rule["bands"]) for name, rule in found.contract["sensors"].items()}
    cfg.data.dir = str(data)
    return cfg


def _sensor(contract: Mapping[str, Any], features: str) -> str | None:
    """The sensor whose features are scored; None for the fused ones."""
    if features == "fused":
        return None
    if features not in contract["sensors"]:
        raise ValueError(f"--features {features}: the network gives fused, {', '.join(contract['sensors'])}")
    return features


def network_methods(
    network: networks.Network, tasks: tuple[str, ...], sensor: str | None, *, tile: int, patch: int
) -> dict[str, rows.Method]:
    """The trained network and the same one untrained as evaluation methods, one compiled program for both."""
    prefix = "" if sensor is None else f"{sensor}_"
    wanted = {"scene": f"{prefix}image", "patch": f"{prefix}pixel"}

    @jax.jit
    def forward(encoder: Any, inputs: Arrays) -> dict[str, jax.Array]:
        out = network.features(encoder, inputs)
        return {task: out[wanted[task]] for task in tasks}

    def method(encoder: Any) -> rows.Method:
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
        seen = {name: one for name, one in inputs.items() if name == sensor or (sensor is None and name != PLACE)}
        return {
            task: baselines.image_statistics(seen, tile=tile, patch=patch if task == "patch" else None)
            for task in tasks
        }

    return features


def _collect(
    cfg: Any,
    contract: Mapping[str, Any],
    split: str,
    methods: Mapping[str, Callable],
    tasks: tuple[str, ...],
    needs: str | None,
) -> dict[str, rows.Rows]:
    size = int(cfg.eval.batch)
    total = -(-len(records.open_places(cfg.data.dir, split)) // size)
    batches = tqdm(
        views.eval_batches(cfg, contract, split, size), total=total, desc=f"features, {split} places", unit="batch"
    )
    return rows.collect(batches, methods, tasks, patch=int(cfg.eval.patch), needs=needs)


def _class_names(meta: Mapping[str, Any], task: str, classes: list[int]) -> list[str]:
    if task == "scene":
        return [meta["label_classes"][index] for index in classes]
    return [meta["label_map_classes"].get(str(index), str(index)) for index in classes]


def places_in_region(network: networks.Network, bank: Mapping[str, np.ndarray], cfg: Any, row: int) -> region.Seen:
    """The places of a dataset that lie in a region, encoded. cfg: of :func:`settings`. ValueError: there is none."""
    found = network.description
    records.check_georeferenced(records.read_metadata(cfg.data.dir), cfg.data.dir)
    model, size = skysense.make_model(found.model, found.contract), int(cfg.eval.batch)
    width, side = found.model.fusion.embed_dims, skysense.region_side(found.model.geo_context)

    @jax.jit
    def forward(encoder: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
        out = model.apply(encoder, inputs)
        return model.query(encoder, out["fused"][..., :width]), out["fused_mask"]

    encoder = jax.tree.map(jax.numpy.asarray, skysense.with_bank(network.encoder, None))  # to the device once
    parts: list[dict[str, Any]] = []
    for split in records.splits(cfg.data.dir):
        lon, lat = records.locations(cfg.data.dir, split)
        ids = regions.cell_ids(lon, lat, bank["lon_edges"], bank["lat_edges"], side)
        chosen = np.flatnonzero(ids == bank["cells"][row])
        batches = views.eval_batches(cfg, found.contract, split, size, chosen)
        for batch in tqdm(batches, total=-(-len(chosen) // size), desc=f"places of the region, {split}", unit="batch"):
            real = batch["weight"] > 0
            query, mask = (np.asarray(one)[real] for one in forward(encoder, batch["sensors"]))
            parts.append(
                {
                    "query": unit(query).astype(np.float32),
                    "mask": mask > 0,
                    "label": batch["label_map"][real],
                    "names": batch["place"]["name"][real],
                    "lon": batch["place"]["lon"][real],
                    "lat": batch["place"]["lat"][real],
                }
            )
    if not parts:
        raise ValueError(f"{cfg.data.dir} has no place in this region")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
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
