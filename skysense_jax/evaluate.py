"""`skysense-jax eval`: what frozen features of a trained network are worth, beside two baselines, with intervals over
places.

The network is fixed before it sees a label: the teacher of the run (or the weights of an export). The dataset's split
"train" fits kNN and linear probe and chooses its regularisation, the split "test" (other places) is only scored. The
same rows are scored for the same network untrained (same architecture, normalisation and seed of the run) and for
per-band statistics of the images.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from skysense_jax import embed
from skysense_jax.data import pipeline, sources
from skysense_jax.data.parts import write_atomically
from skysense_jax.evals import baselines, compare, rows
from skysense_jax.models.inputs import PLACE

Arrays = Mapping[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("path", help="workdir, checkpoint or exported folder")
    parser.add_argument("--data", required=True, help="dataset written by `data build`, with labels")
    parser.add_argument(
        "--task",
        choices=(*rows.TASKS, "all"),
        default="all",
        help="scene: labels of places; patch: patches of the label map; all: those the dataset has labels for",
    )
    parser.add_argument(
        "--features",
        default="fused",
        help="fused, or one sensor's features (hr, s2, s1, dsm): only places that have it are scored",
    )
    parser.add_argument(
        "--config",
        help="configuration whose data.eval_dates and eval section are used instead of the run's; needed "
        "for weights that were not trained here",
    )
    parser.add_argument(
        "--bank",
        default=embed.OWN_BANK,
        help="prototype bank of a network with geo-context: own (frozen), none (features without it), or a folder with "
        "another network whose bank is as wide",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--out", help="JSON file to write")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the tables, writes the JSON."""
    if args.out and not pathlib.Path(args.out).resolve().parent.is_dir():
        raise ValueError(f"--out {args.out}: its folder does not exist")
    report = evaluate(
        args.path,
        args.data,
        task=args.task,
        features=args.features,
        seed=args.seed,
        bank=args.bank,
        config=None if args.config is None else embed.read_config(args.config),
    )
    report["command"] = shlex.join(["skysense-jax", *sys.argv[1:]])
    print(text(report))
    if args.out:
        write_atomically(pathlib.Path(args.out), (json.dumps(report, indent=1) + "\n").encode())
        print(f"written: {args.out}")
    return 0


def text(report: Mapping[str, Any]) -> str:
    """The report as it is printed."""
    network, data = report["network"], report["dataset"]
    lines = [
        f"network  {network['path']} ({network['kind']}, step {network['step']}), features: {report['features']}, "
        f"prototype bank: {report['bank']}",
        f"dataset  {data['dir']} ({data['dataset_id']})",
        f"kNN k={report['eval']['knn_k']}, cosine, T={report['eval']['knn_temp']}; linear probe: strength by "
        "cross-validation on the training places",
        "statistics: mean, deviation and percentiles of every band, standardised on the training rows",
        f"95 % intervals: {report['eval']['bootstrap']} resamples of the test places; * = a difference whose interval "
        "does not hold 0",
    ]
    for task, result in report["tasks"].items():
        name = task if task == "scene" else f"patch of {report['eval']['patch']}x{report['eval']['patch']} base pixels"
        lines += ["", compare.table(result, name)]
    if data["synthetic"]:
        lines += ["", "SYNTHETIC DATA: these numbers test the pipeline, they say nothing about the Earth."]
    return "\n".join(lines)


def evaluate(
    path: str,
    data: str,
    *,
    task: str = "all",
    features: str = "fused",
    seed: int = 0,
    config: Any = None,
    bank: str = embed.OWN_BANK,
) -> dict[str, Any]:
    """The evaluation as a JSON-able dict; see `evals.compare.compare` for "tasks".

    path: workdir, checkpoint or export. data: dataset folder. task, features, seed, bank: as the command's options.
    Raises ValueError where network and dataset do not fit, or the dataset has no labels for the task.
    """
    started = time.monotonic()
    found = embed.read_description(path)
    meta = sources.read_metadata(data)
    if found.model.name == embed.MSGFM:  # takes what is there; SkySense's fused map wants every sensor
        held = {name: rule for name, rule in found.contract["sensors"].items() if name in meta["sensors"]}
        found = found._replace(contract={**found.contract, "sensors": held})
    cfg, contract = settings(found, config, data), found.contract
    sources.check_dataset(meta, contract, cfg)
    tasks, sensor = _tasks(meta, task), _sensor(contract, features)
    methods = network_methods(
        embed.open_network(path, bank), tasks, sensor, tile=int(meta["tile"]), patch=int(cfg.eval.patch)
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
        "bank": bank if embed.has_geo(found) else embed.NO_BANK,
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


def settings(found: embed.Description, config: Any, data: str) -> Any:
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
    network: embed.Network, tasks: tuple[str, ...], sensor: str | None, *, tile: int, patch: int
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
    return {"trained": method(encoder), "untrained": method(embed.untrained(network.description))}


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
    total = -(-len(sources.open_places(cfg.data.dir, split)) // size)
    batches = tqdm(
        pipeline.eval_batches(cfg, contract, split, size), total=total, desc=f"features, {split} places", unit="batch"
    )
    return rows.collect(batches, methods, tasks, patch=int(cfg.eval.patch), needs=needs)


def _class_names(meta: Mapping[str, Any], task: str, classes: list[int]) -> list[str]:
    if task == "scene":
        return [meta["label_classes"][index] for index in classes]
    return [meta["label_map_classes"].get(str(index), str(index)) for index in classes]


def commit() -> str | None:
    """Commit of the checkout this package runs from, with "-dirty" where files differ; None outside of a checkout."""
    root = pathlib.Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty"], capture_output=True, text=True
    )
    return found.stdout.strip() or None
