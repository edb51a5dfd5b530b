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
    """Where the run starts from."""

    state: state.TrainState
    step: int
    seconds: dict[str, float]


def where_to_start(
    cfg: config_dict.ConfigDict,
    workdir: epath.Path,
    plan: Plan,
    meta: Mapping[str, Any],
    given: epath.Path | None = None,
) -> Start:
    """1. the newest sound checkpoint of this workdir; 2. the weights of --init_from; 3. scratch."""
    found = checkpoint.restore_latest_valid(
        workdir, plan.state, lambda found: folder.check_same_run(cfg, plan.contract, meta["dataset_id"], found)
    )
    if found is not None:
        position = data_position(cfg, found.step)
        if found.data != position:
            raise ValueError(f"checkpoint {found.step} stands at {found.data} in the data, this run at {position}")
        changed = [name for name, version in meta["code"].items() if found.meta["code"].get(name) != version]
        say(f"resuming from step {found.step}")
        if changed:
            say(f"note: other code wrote it ({', '.join(changed)}); the bits may differ from those of an unbroken run")
        return Start(found.state, found.step, found.meta["seconds"])
    geo, fresh = cfg.model.get("geo_context"), state.create(plan.objective, plan.batch, cfg.seed, plan.state)
    if geo is not None and geo.bank == "on" and geo.table == "places":
        fresh = init_from.with_regions(cfg, fresh)
    if "distill" in cfg.objective and cfg.objective.distill.weight:
        fresh = init_from.with_teacher(cfg, fresh)
    if given is None:
        if geo is not None and geo.bank == "frozen":
            raise ValueError(
                "config.model.geo_context.bank='frozen': a bank that nothing has learnt; start from a run "
                "that has one (--init_from), or take 'on'"
            )
        say("starting from scratch")
        return Start(fresh, 0, {})
    begun, report = init_from.init_from(given, fresh, json.loads(json.dumps(plan.contract)))
    if geo is not None and geo.bank == "frozen" and not jax.device_get(begun.memory["bank"]["visits"]).any():
        raise ValueError(f"config.model.geo_context.bank='frozen': {given} holds no bank that has learnt; take 'on'")
    say(f"starting from the weights of {given}: {len(report['taken'])} leaves")
    for kind in ("new", "widened", "left"):
        if report[kind]:
            say(f"  {kind}: {', '.join(report[kind])}")
    return Start(begun, 0, {})


def data_position(cfg: config_dict.ConfigDict, done: int) -> dict[str, int]:
    """Where the data stream stands after `done` steps: everything that the next batch depends on."""
    batch = int(cfg.data.batch)
    return {"step": done, "seed": int(cfg.seed), "batch": batch, "places_seen": done * batch}
