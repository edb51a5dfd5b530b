"""Where a run starts from: its own newest checkpoint, the weights of another network, or scratch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from etils import epath
from ml_collections import config_dict

from skysense_jax.run import checkpoint, folder, init_from, state
from skysense_jax.run.folder import say
from skysense_jax.run.plan import Plan


class Start(NamedTuple):
    """Where the run starts from.

    Attributes:
        state: on its mesh.
        step: steps done.
        seconds: of earlier starts of the run, by purpose (run.log.metrics.Timers).
    """

    state: state.TrainState
    step: int
    seconds: dict[str, float]


def where_to_start(
    cfg: config_dict.ConfigDict,
    workdir: epath.Path,
    plan: Plan,
    meta: Mapping[str, Any],
    source: epath.Path | None = None,
) -> Start:
    """1. the newest sound checkpoint of this workdir; 2. the weights of --init_from; 3. scratch.

    Args:
        cfg: the whole configuration.
        workdir: folder of the run.
        plan: of the run.
        meta: what this run's checkpoints say about it (run.folder.run_meta).
        source: workdir, checkpoint or imported weights of --init_from; None: scratch.

    Returns:
        The start.

    Raises:
        ValueError: the workdir was begun by another run or its checkpoints are damaged, the source does not fit, or a
            frozen prototype bank has nothing that it learnt.
    """
    restored = checkpoint.restore_latest_valid(
        workdir, plan.state, lambda written: folder.check_same_run(cfg, plan.contract, meta["dataset_id"], written)
    )
    if restored is not None:
        return _resume(cfg, meta, restored)
    fresh = _fresh_state(cfg, plan)
    if source is None:
        if _bank_is_frozen(cfg):
            raise ValueError(
                "config.model.geo_context.bank='frozen': a bank that nothing has learnt; start from a run "
                "that has one (--init_from), or take 'on'"
            )
        say("starting from scratch")
        return Start(fresh, 0, {})
    begun, report = init_from.init_from(source, fresh, json.loads(json.dumps(plan.contract)))
    if _bank_is_frozen(cfg) and not jax.device_get(begun.memory["bank"]["visits"]).any():
        raise ValueError(f"config.model.geo_context.bank='frozen': {source} holds no bank that has learnt; take 'on'")
    say(f"starting from the weights of {source}: {len(report['taken'])} leaves")
    for kind in ("new", "widened", "left"):
        if report[kind]:
            say(f"  {kind}: {', '.join(report[kind])}")
    return Start(begun, 0, {})


def _resume(cfg: config_dict.ConfigDict, meta: Mapping[str, Any], restored: checkpoint.Restored) -> Start:
    """The start from a checkpoint of this workdir; ValueError where it stands elsewhere in the data than this run."""
    position = data_position(cfg, restored.step)
    if restored.data != position:
        raise ValueError(f"checkpoint {restored.step} stands at {restored.data} in the data, this run at {position}")
    changed = [name for name, version in meta["code"].items() if restored.meta["code"].get(name) != version]
    say(f"resuming from step {restored.step}")
    if changed:
        say(f"note: other code wrote it ({', '.join(changed)}); the bits may differ from those of an unbroken run")
    return Start(restored.state, restored.step, restored.meta["seconds"])


def _fresh_state(cfg: config_dict.ConfigDict, plan: Plan) -> state.TrainState:
    """The state before the first step, with what some configurations read from elsewhere before it begins.

    A prototype bank whose table lists places (config.model.geo_context) gets the regions of the training places; a
    distillation (config.objective.distill) gets its frozen teacher.
    """
    fresh = state.create(plan.objective, plan.batch, cfg.seed, plan.state)
    geo = cfg.model.get("geo_context")
    if geo is not None and geo.bank == "on" and geo.table == "places":
        fresh = init_from.with_regions(cfg, fresh)
    if "distill" in cfg.objective and cfg.objective.distill.weight:
        fresh = init_from.with_teacher(cfg, fresh)
    return fresh


def _bank_is_frozen(cfg: config_dict.ConfigDict) -> bool:
    """Whether the run uses a prototype bank that it does not train, so that another run must have learnt it."""
    geo = cfg.model.get("geo_context")
    return geo is not None and geo.bank == "frozen"


def data_position(cfg: config_dict.ConfigDict, done: int) -> dict[str, int]:
    """Where the data stream stands after some steps: everything that the next batch depends on.

    Args:
        cfg: the whole configuration.
        done: steps done.

    Returns:
        JSON values, written into every checkpoint.
    """
    batch = int(cfg.data.batch)
    return {"step": done, "seed": int(cfg.seed), "batch": batch, "places_seen": done * batch}
