"""`skysense-jax eval`: scores frozen features of a trained network beside two baselines, with intervals over places."""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from skysense_jax import networks
from skysense_jax.core import exits
from skysense_jax.core.config import read_config
from skysense_jax.core.files import write_atomically
from skysense_jax.evals import compare, rows
from skysense_jax.evaluation import evaluate


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
        default=networks.OWN_BANK,
        help="prototype bank of a network with geo-context: own (frozen), none (features without it), or a folder with "
        "another network whose bank is as wide",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the bootstrap")
    parser.add_argument("--out", help="JSON file to write")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the tables, writes the JSON.

    Raises:
        ValueError: the folder of --out does not exist; as `evaluation.evaluate`.
    """
    if args.out and not pathlib.Path(args.out).resolve().parent.is_dir():
        raise ValueError(f"--out {args.out}: its folder does not exist")
    report = evaluate(
        args.path,
        args.data,
        task=args.task,
        features=args.features,
        seed=args.seed,
        bank=args.bank,
        config=None if args.config is None else read_config(args.config),
    )
    report["command"] = shlex.join(["skysense-jax", *sys.argv[1:]])
    print(text(report))
    if args.out:
        write_atomically(pathlib.Path(args.out), (json.dumps(report, indent=1) + "\n").encode())
        print(f"written: {args.out}")
    return exits.DONE


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
