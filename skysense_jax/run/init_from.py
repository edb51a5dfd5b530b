"""What a new run begins with: the weights of another run, and the regions of its training places.

A leaf that is the same is taken, a leaf that is new is named, and a leaf that contradicts is refused.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from skysense_jax.core import paths, trees
from skysense_jax.data import records
from skysense_jax.models import systems
from skysense_jax.ops import regions
from skysense_jax.run import checkpoint, imported
from skysense_jax.run.state import TrainState
from skysense_jax.sensors import Contract

TAKEN = ("params", "teacher", "memory")
"""Trees of a state that begin as those of the other run; optimiser and step stay fresh."""

WIDENED = "heads/fused/mlp0/kernel"
"""The fused head's first layer, [channels, hidden]: geo-context adds channels behind those it had. The rows of the new
channels start at 0, so that the head begins where it stood."""

GRID = ("memory/bank/lon_edges", "memory/bank/lat_edges")
"""Edges of the grid whose cells a bank's table of regions numbers."""

TABLE = "memory/bank/cells"
"""A bank's table of regions: the cell of each row."""


def init_from(
    path: pathlib.Path | str, fresh: TrainState, contract: Contract
) -> tuple[TrainState, dict[str, list[str]]]:
    """Begins a new run with the weights of another; optimiser and step stay fresh.

    Args:
        path: a workdir or checkpoint, whose parameters, teacher and memory are taken, or a folder that import-torch
            wrote, whose encoder is taken.
        fresh: the state of the new run.
        contract: the input contract of the new run, which may have sensors that the source does not know.

    Returns:
        (state, names of leaves by what became of them). "taken": as in the source. "new": not in the source, they keep
        their fresh values. "widened": taken, with new rows of zeros. "left": leaves of the source that this run does
        not use.

    Raises:
        ValueError: the input contract differs otherwise, a leaf has another shape, or a bank another grid or table.
        FileNotFoundError, Damaged: as checkpoint.load_tree.
    """
    source = _source(path)
    shared = {name: rule for name, rule in contract["sensors"].items() if name in source.contract["sensors"]}
    if {**contract, "sensors": shared} != source.contract:
        raise ValueError(f"--init_from {path}: its input contract (bands, statistics or ratio) is not that of this run")
    report: dict[str, list[str]] = {"taken": [], "new": [], "widened": [], "left": []}
    begun = {}
    for tree_name in TAKEN:
        stored = trees.flatten(source.read(tree_name))
        begun[tree_name] = _begin(tree_name, getattr(fresh, tree_name), stored, report)
        used = trees.flatten(begun[tree_name])
        report["left"] += [f"{tree_name}/{name}" for name in stored if name not in used]
    return fresh._replace(**begun), report


class _Source(NamedTuple):
    """The input contract of a folder with weights, and what reads one of TAKEN as a tree; {} where it has none."""

    contract: dict[str, Any]
    read: Callable[[str], trees.Tree]


def _source(path: pathlib.Path | str) -> _Source:
    """A checkpoint or imported weights; with the latter a SkySense teacher begins as the encoder it will follow."""
    folder = paths.path(path)
    if not imported.recognise(folder):
        meta = checkpoint.load_meta(folder)

        def read_checkpoint(tree_name: str) -> trees.Tree:
            return checkpoint.load_tree(folder, tree_name, meta["step"]) if tree_name in meta["digests"] else {}

        return _Source(meta["contract"], read_checkpoint)
    description = imported.describe(folder)
    trees_with_encoder = {"params", systems.system_of(description.model).trained_tree}

    def read_imported(tree_name: str) -> trees.Tree:
        return {"encoder": imported.weights(description)} if tree_name in trees_with_encoder else {}

    return _Source(description.contract, read_imported)


def _begin(
    tree_name: str, fresh: trees.Tree, stored: Mapping[str, np.ndarray], report: dict[str, list[str]]
) -> trees.Tree:
    """A tree of the new run, each leaf of it as :func:`_begin_leaf` decides."""
    return trees.map_named(lambda name, leaf: _begin_leaf(f"{tree_name}/{name}", leaf, stored.get(name), report), fresh)


def _begin_leaf(full: str, fresh: jax.Array, value: np.ndarray | None, report: dict[str, list[str]]) -> jax.Array:
    """One leaf of the new run from its stored value, by the rules of this module; its name goes into the report."""
    if value is None:
        report["new"].append(full)
        return fresh
    if full.partition("/")[2] == WIDENED and value.shape[0] < fresh.shape[0] and value.shape[1:] == fresh.shape[1:]:
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
        stored, built = (f"{x.dtype}{list(x.shape)}" for x in (value, fresh))
        raise ValueError(f"--init_from: {full} is {stored} there, {built} here")
    else:
        report["taken"].append(full)
    return jax.device_put(value, fresh.sharding)


def with_teacher(cfg: config_dict.ConfigDict, fresh: TrainState) -> TrainState:
    """Gives a fresh state the frozen teacher of config.objective.distill.path.

    Args:
        cfg: the whole configuration; the path is a workdir or checkpoint of msGFM, or imported weights.
        fresh: the state of the new run.

    Returns:
        The state with the teacher's weights.

    Raises:
        ValueError: there is no path, or names the leaf that is missing or has another shape.
    """
    path = cfg.objective.distill.path
    if not path:
        raise ValueError("config.objective.distill.weight is set: give config.objective.distill.path, the teacher")
    report: dict[str, list[str]] = {"taken": [], "new": [], "widened": []}
    teacher = _begin("teacher", fresh.teacher, trees.flatten(_source(path).read("params")), report)
    if report["new"]:
        raise ValueError(f"config.objective.distill.path={path} lacks {', '.join(report['new'][:5])}")
    return fresh._replace(teacher=teacher)


def with_regions(cfg: config_dict.ConfigDict, fresh: TrainState) -> TrainState:
    """Gives the prototype bank of a fresh state the grid cells of the training places.

    Args:
        cfg: the whole configuration.
        fresh: the state of the new run.

    Returns:
        The state whose bank knows these regions.

    Raises:
        ValueError: there are more cells than the bank has regions.
    """
    bank = fresh.memory["bank"]
    edges = jax.device_get((bank["lon_edges"], bank["lat_edges"]))
    ids = regions.cell_ids(*records.locations(cfg.data.dir, cfg.data.split), *edges)
    cells = jax.device_put(regions.occupied(ids, cfg.model.geo_context.regions), bank["cells"].sharding)
    return fresh._replace(memory={**fresh.memory, "bank": {**bank, "cells": cells}})
