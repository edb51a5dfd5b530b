"""What a new run begins with: the weights of another one (what is the same is taken, what is new is named, what
contradicts is refused), and the regions of its training places.
"""
from __future__ import annotations

import pathlib
from typing import Any, Mapping

import jax
import numpy as np

from skysense_jax.core import trees
from skysense_jax.data import sources
from skysense_jax.ops import regions
from skysense_jax.run import checkpoint
from skysense_jax.run.state import TrainState

TAKEN = ("params", "teacher", "memory")
IMPORTED = "parts"
"""Folder of modules inside imported weights."""

WIDENED = "heads/fused/mlp0/kernel"
"""The fused head's first layer, [channels, hidden]: geo-context adds channels behind those it had. Their rows start at
0, so that the head begins where it stood."""


def init_from(
    path: pathlib.Path | str, now: TrainState, contract: Mapping[str, Any]
) -> tuple[TrainState, dict[str, list[str]]]:
    """A fresh state with the parameters, teacher and memory of a workdir or checkpoint; optimiser and step stay fresh.

    Returns (state, {"taken", "new", "widened", "left": names of leaves}): "new" keep their fresh values, "left" are
    those of the checkpoint this run has no use for. This run may take sensors the checkpoint does not know. Raises
    ValueError where the input contract is otherwise another one or a leaf has another shape; errors of
    checkpoint.load_tree.
    """
    meta = checkpoint.load_meta(path)
    known = {name: rule for name, rule in contract["sensors"].items() if name in meta["contract"]["sensors"]}
    if {**contract, "sensors": known} != meta["contract"]:
        raise ValueError(f"--init_from {path}: its input contract (bands, statistics or ratio) is not that of this run")
    report: dict[str, list[str]] = {"taken": [], "new": [], "widened": [], "left": []}
    parts = {}
    for part in TAKEN:
        old = trees.flatten(checkpoint.load_tree(path, part, meta["step"])) if part in meta["digests"] else {}
        parts[part] = trees.map_named(lambda name, leaf: _leaf(part, name, leaf, old, report), getattr(now, part))
        report["left"] += [f"{part}/{name}" for name in old if name not in trees.flatten(parts[part])]
    return now._replace(**parts), report


def _leaf(part: str, name: str, fresh: jax.Array, old: Mapping[str, np.ndarray], report: dict[str, list[str]]) -> Any:
    full = f"{part}/{name}"
    if name not in old:
        report["new"].append(full)
        return fresh
    value = old[name]
    if name == WIDENED and value.shape[0] < fresh.shape[0] and value.shape[1:] == fresh.shape[1:]:
        report["widened"].append(full)
        value = np.concatenate([value, np.zeros((fresh.shape[0] - value.shape[0], *value.shape[1:]), value.dtype)])
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
    path = pathlib.Path(cfg.objective.distill.path)
    if not cfg.objective.distill.path:
        raise ValueError("config.objective.distill.weight is set: give config.objective.distill.path, the teacher")
    parts = fresh.teacher["encoder"]
    if (path / IMPORTED).is_dir():
        found = {name: checkpoint.load_part(path / IMPORTED, name) for name in parts}
    else:
        found = checkpoint.load_tree(path, "params")["encoder"]
    old, report = trees.flatten({"encoder": found}), {"taken": [], "new": [], "widened": []}
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
    ids = regions.cell_ids(*sources.locations(cfg.data.dir, cfg.data.split), *edges)
    cells = jax.device_put(regions.occupied(ids, cfg.model.geo_context.regions), bank["cells"].sharding)
    return fresh._replace(memory={**fresh.memory, "bank": {**bank, "cells": cells}})
