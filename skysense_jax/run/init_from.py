"""What a new run begins with: the weights of another one (what is the same is taken, what is new is named, what
contradicts is refused), and the regions of its training places.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from skysense_jax.core import paths, trees
from skysense_jax.data import records
from skysense_jax.models import systems
from skysense_jax.ops import regions
from skysense_jax.run import checkpoint, imported
from skysense_jax.run.state import TrainState

TAKEN = ("params", "teacher", "memory")

WIDENED = "heads/fused/mlp0/kernel"
"""The fused head's first layer, [channels, hidden]: geo-context adds channels behind those it had. Their rows start at
0, so that the head begins where it stood."""

GRID = ("memory/bank/lon_edges", "memory/bank/lat_edges")
"""What a bank's table of regions counts cells of."""

TABLE = "memory/bank/cells"


def init_from(
    path: pathlib.Path | str, now: TrainState, contract: Mapping[str, Any]
) -> tuple[TrainState, dict[str, list[str]]]:
    """A fresh state with the parameters, teacher and memory of a workdir or checkpoint, or with the encoder of a folder
    that import-torch wrote; optimiser and step stay fresh.

    Returns (state, {"taken", "new", "widened", "left": names of leaves}): "new" keep their fresh values, "left" are
    those of the checkpoint this run has no use for. This run may take sensors the checkpoint does not know. Raises
    ValueError where the input contract is otherwise another one or a leaf has another shape; errors of
    checkpoint.load_tree.
    """
    there, read = _source(path)
    known = {name: rule for name, rule in contract["sensors"].items() if name in there["sensors"]}
    if {**contract, "sensors": known} != there:
        raise ValueError(f"--init_from {path}: its input contract (bands, statistics or ratio) is not that of this run")
    report: dict[str, list[str]] = {"taken": [], "new": [], "widened": [], "left": []}
    parts = {}
    for part in TAKEN:
        old = trees.flatten(read(part))
        parts[part] = trees.map_named(lambda name, leaf: _leaf(part, name, leaf, old, report), getattr(now, part))
        used = trees.flatten(parts[part])
        report["left"] += [f"{part}/{name}" for name in old if name not in used]
    return now._replace(**parts), report


def _source(path: pathlib.Path | str) -> tuple[dict[str, Any], Callable[[str], Any]]:
    """(input contract, what reads one of TAKEN as a tree, empty where it is not there) of a checkpoint, or of imported
    weights: a SkySense teacher begins as the encoder it will follow.
    """
    folder = paths.path(path)
    if not imported.recognise(folder):
        meta = checkpoint.load_meta(folder)

        def read(part: str) -> Any:
            return checkpoint.load_tree(folder, part, meta["step"]) if part in meta["digests"] else {}

        return meta["contract"], read
    description = imported.describe(folder)
    trees_with_encoder = {"params", systems.system_of(description.model).trained_tree}
    return (
        description.contract,
        lambda part: {"encoder": imported.weights(description)} if part in trees_with_encoder else {},
    )


def _leaf(part: str, name: str, fresh: jax.Array, old: Mapping[str, np.ndarray], report: dict[str, list[str]]) -> Any:
    full = f"{part}/{name}"
    if name not in old:
        report["new"].append(full)
        return fresh
    value = old[name]
    if name == WIDENED and value.shape[0] < fresh.shape[0] and value.shape[1:] == fresh.shape[1:]:
        report["widened"].append(full)
        value = np.concatenate([value, np.zeros((fresh.shape[0] - value.shape[0], *value.shape[1:]), value.dtype)])
    elif full in GRID and not np.array_equal(value, jax.device_get(fresh)):
        raise ValueError(
            f"--init_from: the regions of its bank are cells of another grid than this run's ({full}); "
            "take the config.model.geo_context.cell of the run it was learnt in"
        )
    elif full == TABLE and regions.is_shared(value) != regions.is_shared(jax.device_get(fresh)):
        raise ValueError(
            "--init_from: of its bank and this run's one has config.model.geo_context.table='hashed'; "
            "take the table of the run it was learnt in"
        )
    elif (value.shape, value.dtype) != (fresh.shape, fresh.dtype):
        there, here = (f"{x.dtype}{list(x.shape)}" for x in (value, fresh))
        raise ValueError(f"--init_from: {full} is {there} there, {here} here")
    else:
        report["taken"].append(full)
    return jax.device_put(value, fresh.sharding)


def with_teacher(cfg: Any, fresh: TrainState) -> TrainState:
    """A fresh state whose frozen teacher has the weights of config.objective.distill.path: a workdir or checkpoint of
    msGFM, or imported weights. ValueError naming the leaf that is missing or has another shape.
    """
    path = cfg.objective.distill.path
    if not path:
        raise ValueError("config.objective.distill.weight is set: give config.objective.distill.path, the teacher")
    old, report = trees.flatten(_source(path)[1]("params")), {"taken": [], "new": [], "widened": []}
    teacher = trees.map_named(lambda name, leaf: _leaf("teacher", name, leaf, old, report), fresh.teacher)
    if report["new"]:
        raise ValueError(f"config.objective.distill.path={path} lacks {', '.join(report['new'][:5])}")
    return fresh._replace(teacher=teacher)


def with_regions(cfg: Any, fresh: TrainState) -> TrainState:
    """A fresh state whose prototype bank knows the grid cells of the training places. cfg: the whole configuration.
    ValueError: too many of them.
    """
    bank = fresh.memory["bank"]
    edges = jax.device_get((bank["lon_edges"], bank["lat_edges"]))
    ids = regions.cell_ids(*records.locations(cfg.data.dir, cfg.data.split), *edges)
    cells = jax.device_put(regions.occupied(ids, cfg.model.geo_context.regions), bank["cells"].sharding)
    return fresh._replace(memory={**fresh.memory, "bank": {**bank, "cells": cells}})
