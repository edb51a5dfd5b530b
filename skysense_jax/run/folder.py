"""The folder of a run: what it says about itself, whether a run may continue in it, and how `networks` opens it.

It holds reports for people, and checkpoints whose meta tells which run wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from etils import epath
from ml_collections import config_dict

import skysense_jax
from skysense_jax.core import config, paths, sharding, trees
from skysense_jax.core.config import from_json
from skysense_jax.models import skysense, systems
from skysense_jax.models.description import Description, Reader
from skysense_jax.run import checkpoint
from skysense_jax.run.state import TrainState
from skysense_jax.sensors import Contract

COMPLETE = "TRAIN_COMPLETE"
"""The mark of a run that is done: a file in its folder."""

MAY_CHANGE = (
    "run.",
    "mesh.",
    "eval.",
    "data.dir",
    "data.also",
    "data.threads",
    "data.prefetch",
    "data.max_bad_records",
)
"""Fields that may differ in a resumed run: how it runs, not what it computes (a dataset is known by its id)."""


class Reported(Protocol):
    """What the reports tell of a run's plan (`run.plan.Plan`)."""

    @property
    def contract(self) -> Contract:
        """The input contract."""
        ...

    @property
    def state(self) -> TrainState:
        """The state as shapes with shardings."""
        ...

    @property
    def batch(self) -> trees.Tree:
        """The global batch as shapes with shardings."""
        ...


def say(text: str) -> None:
    """Prints one line for the person who watches, from one process."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def as_json(cfg: config_dict.ConfigDict) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    return json.loads(cfg.to_json())


def run_meta(cfg: config_dict.ConfigDict, contract: Contract, dataset_id: str) -> dict[str, Any]:
    """What every checkpoint of the run says about itself.

    Args:
        cfg: the whole configuration.
        contract: the input contract.
        dataset_id: of the dataset it trains on.

    Returns:
        JSON values: "format", "config", "contract", "dataset_id" and "code" (versions and a digest of the sources).
    """
    package = pathlib.Path(skysense_jax.__file__).parent
    files = [file for file in sorted(package.rglob("*.py")) if file.relative_to(package).parts[0] != "configs"]
    sources = b"".join(file.read_bytes() for file in files)  # a wheel has configs inside, a checkout beside the package
    code = {
        "skysense_jax": skysense_jax.__version__,
        "sources_sha256": hashlib.sha256(sources).hexdigest(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
    return {"format": 1, "config": as_json(cfg), "contract": dict(contract), "dataset_id": dataset_id, "code": code}


def check_same_run(cfg: config_dict.ConfigDict, contract: Contract, dataset_id: str, meta: Mapping[str, Any]) -> None:
    """Refuses to continue a checkpoint that another run wrote.

    Args:
        cfg: this run's whole configuration.
        contract: this run's input contract.
        dataset_id: of this run's dataset.
        meta: of the checkpoint (:func:`run_meta`).

    Raises:
        ValueError: names the fields that differ.
    """
    current, before = config.flatten(as_json(cfg)), config.flatten(meta["config"])
    names = [name for name in sorted(set(current) | set(before)) if not name.startswith(MAY_CHANGE)]
    differ = [
        f"config.{name} was {before.get(name)!r}, is {current.get(name)!r}"
        for name in names
        if current.get(name) != before.get(name)
    ]
    if differ:
        raise ValueError(
            "this workdir was begun with another configuration: " + "; ".join(differ[:8]) + ". Use another --workdir."
        )
    if meta["dataset_id"] != dataset_id:
        raise ValueError(
            f"this workdir was begun on dataset {meta['dataset_id']}, config.data.dir={cfg.data.dir} is {dataset_id}"
        )
    if meta["contract"] != json.loads(json.dumps(contract)):
        raise ValueError(
            "this workdir was begun with another input contract (bands, statistics or ratio). Use another --workdir."
        )


def write_reports(workdir: epath.Path, plan: Reported, mesh: jax.sharding.Mesh, meta: Mapping[str, Any]) -> None:
    """Writes what this run is, for people: config, contract, element spec, shardings, versions; again at every start.

    Args:
        workdir: folder of the run.
        plan: of the run.
        mesh: of the run.
        meta: :func:`run_meta`.
    """
    reports = {
        name: sharding.report(shapes := getattr(plan.state, name), jax.tree.map(lambda leaf: leaf.sharding, shapes))
        for name in checkpoint.TREES
    }
    for name, report in reports.items():
        say(
            f"{name}: {report.total / 2**20:.1f} MiB, per device {report.per_device / 2**20:.1f} MiB, "
            f"replicated {report.replicated / 2**20:.1f} MiB"
        )
    spec = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in trees.flatten(plan.batch).items()}
    files = {
        "config.json": meta["config"],
        "contract.json": plan.contract,
        "element_spec.json": spec,
        "sharding.json": {"mesh": dict(mesh.shape), **{name: report._asdict() for name, report in reports.items()}},
        "versions.json": {
            **meta["code"],
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        },
    }
    if jax.process_index() == 0:
        for name, value in files.items():
            (workdir / name).write_text(json.dumps(value, indent=1) + "\n")


def commit() -> str | None:
    """Commit of the checkout that this package runs from, "-dirty" where files differ; None outside of a checkout."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    described = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"], capture_output=True, text=True
    )
    return described.stdout.strip() or None


def is_workdir(folder: pathlib.Path) -> bool:
    """Whether a folder is a run's."""
    return (folder / "checkpoints").is_dir()


def is_checkpoint(folder: pathlib.Path) -> bool:
    """Whether a folder is one checkpoint of a run, WORKDIR/checkpoints/STEP."""
    if not folder.is_dir():
        return False
    full = paths.absolute(folder)
    return full.parent.name == "checkpoints" and full.name.isdigit()


def describe(kind: str, folder: pathlib.Path) -> Description:
    """The description of a workdir's newest checkpoint, or of one checkpoint.

    Args:
        kind: of the folder, for the description.
        folder: a workdir or a checkpoint.

    Returns:
        The network without its weights.

    Raises:
        Damaged: (a ValueError) the checkpoint was altered.
    """
    meta = checkpoint.load_meta(folder)
    whole = from_json(meta["config"])
    provenance = {
        "step": meta["step"],
        "of steps": whole.steps,
        "dataset id": meta["dataset_id"],
        "code": meta["code"],
        "seconds": meta.get("seconds"),
        "seed": whole.seed,
    }
    return Description(kind, folder, whole, whole.model, meta["contract"], meta["step"], provenance)


def weights(description: Description) -> trees.Tree:
    """The parameters of the network that a run keeps, with its prototype bank.

    The network is the encoder of `systems.System.trained_tree`, or of params where the run has no such tree: an
    objective without a teacher on a system that usually has one. The parameters are those of the step that was
    described and of no other: damage is an error, not a silent step back.
    """
    system = systems.system_of(description.model)
    trees_there = checkpoint.load_meta(description.path, description.step)["digests"]
    tree = system.trained_tree if system.trained_tree in trees_there else "params"
    encoder = checkpoint.load_tree(description.path, tree, description.step)["encoder"]
    if not system.has_bank(description.model, description.contract):
        return encoder
    return skysense.with_bank(encoder, checkpoint.load_tree(description.path, "memory", description.step)["bank"])


WORKDIR = Reader(
    "workdir", "a workdir has checkpoints/", is_workdir, lambda folder: describe("workdir", folder), weights
)


CHECKPOINT = Reader(
    "checkpoint",
    "a checkpoint is WORKDIR/checkpoints/STEP",
    is_checkpoint,
    lambda folder: describe("checkpoint", folder),
    weights,
)
