"""What geo-context brings: linear probes with and without it, over seeds, from shared first stages.

    python -m experiments.geo_context FOLDER --world regional --seeds 0 1 2 3 4 [--out docs/geo_context.md]
    python -m experiments.geo_context FOLDER --world real --data DATASET --seeds 0 1 2
    python -m experiments.geo_context FOLDER --table --out docs/geo_context.md      # the table of what is there

Everything is kept in FOLDER and nothing is made twice: FOLDER/WORLD-SEED has the places, the four runs and, when they
are scored, scores.json. Per seed: one network trained without a bank, and three second stages from it of as many steps:
without a bank ("none"), with one ("bank"), and with one on a copy of the dataset whose places have each other's
locations ("shuffled"). A seed is that of the world, of the network and of the data order; "real" has one dataset.

The scores (VARIANTS) are those of the dataset's "test" places by a linear probe, its strength chosen on "train", as
`skysense-jax eval` has them; the interval of a mean over seeds is Student's. "region" says how well the same probe
reads the region a place really lies in, of those in the dataset, from the features: whether they know it at all.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds

from experiments.common import mean_and_interval
from skysense_jax import cli, networks
from skysense_jax.core.files import write_atomically, write_between
from skysense_jax.data import records as dataset_records
from skysense_jax.data.batches import whole_places
from skysense_jax.data.synthetic.world import WORLDS
from skysense_jax.evals import compare, linear, metrics, rows
from skysense_jax.models.inputs import PLACE
from skysense_jax.ops import regions
from tests.helpers import noise_dataset

CONFIG = pathlib.Path(__file__).resolve().parents[1] / "configs" / "skysense_tiny.py"

SETTINGS = (
    "data.batch=16",
    "data.global_size=8",
    "data.n_local=0",
    "model.s2.drop_path=0.0",
    "model.s1.drop_path=0.0",
    "model.fusion.drop_path=0.0",
    "model.geo_context.width=32",
    "schedule.warmup_steps=20",
    "schedule.warmup_teacher_temp_steps=40",
    "schedule.freeze_last_layer_steps=20",
    "run.save_every=1000",
    "run.log_every=25",
    "eval.patch=16",
)
"""Of every run, on the test-size configuration with the two time series."""

BANK = "model.geo_context.bank=on"

VARIANTS = {
    "none": "no geo-context",
    "lon/lat": "no geo-context, longitude and latitude appended to the probe's input",
    "bank": "geo-context",
    "left out": "the network trained with geo-context, the context left out of the features",
    "shuffled": "geo-context, locations shuffled among the places in training and evaluation",
    "elsewhere": 'the network and bank of "geo-context", locations shuffled in evaluation only',
}

CHOICE = ("bank", "left out")
"""What a user of the network trained with geo-context chooses from: features with it or without (--bank none). "chosen"
is the linear probe of the one whose best cross-validated score on the training places is higher."""

MARKS = "<!-- rows: python -m experiments.geo_context -->", "<!-- end of rows -->"


def call(*words: object) -> None:
    """Runs and shows `skysense-jax ...` in this process; RuntimeError where it fails."""
    line = [str(word) for word in words]
    print(shlex.join(["skysense-jax", *line]), file=sys.stderr, flush=True)
    if code := cli.main(line):
        raise RuntimeError(f"{shlex.join(line)}: exit code {code}")


def train(
    workdir: pathlib.Path, data: pathlib.Path, seed: int, steps: int, *settings: str, start: pathlib.Path | None = None
) -> None:
    """One run, continued where it was stopped."""
    given = [f"--config.{one}" for one in (*SETTINGS, f"steps={steps}", f"data.dir={data}", f"seed={seed}", *settings)]
    call(
        "train",
        "--config",
        f"{CONFIG}:series",
        "--workdir",
        workdir,
        *given,
        *(["--init_from", start] if start else []),
    )


def make_places(folder: pathlib.Path, world: str, seed: int, places: int) -> pathlib.Path:
    """The dataset of a synthetic world: `data synth` and `data build`."""
    catalog, data = folder / "rasters" / "catalog.csv", folder / "data"
    if not catalog.exists():
        call(
            "data",
            "synth",
            "--out",
            catalog.parent,
            "--world",
            world,
            "--seed",
            seed,
            "--places",
            places,
            "--ratio",
            4,
            "--workers",
            1,
        )
    if not (data / dataset_records.METADATA).exists():
        call("data", "build", "--catalog", catalog, "--out", data, "--ratio", 4, "--sensors", "s2,s1", "--workers", 1)
    return data


def shuffle_places(data: pathlib.Path, out: pathlib.Path, seed: int) -> None:
    """A copy of a dataset in which the places of each split have each other's locations."""
    meta, builder = dataset_records.read_metadata(data), tfds.builder_from_directory(str(data))
    splits = {}
    for split in ("train", "test"):
        records = list(builder.as_data_source(split=split))
        other = np.random.default_rng([seed, 0, 2]).permutation(len(records))
        splits[split] = [
            {**one, "lon": records[j]["lon"], "lat": records[j]["lat"]} for one, j in zip(records, other, strict=True)
        ]
    noise_dataset.write_records(
        out, builder.info.features, splits, {**meta, "dataset_id": f"{meta['dataset_id']}-shuffled"}
    )


def features_of(workdir: pathlib.Path, task: str, patch: int, tile: int, bank: str = networks.OWN_BANK) -> rows.Method:
    """A trained network's fused features as an evaluation method."""
    network = networks.open_network(workdir, bank)
    forward, encoder = jax.jit(network.features), jax.tree.map(jax.numpy.asarray, network.encoder)

    def method(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        out = forward(encoder, inputs)
        if task == "scene":
            return {task: np.asarray(out["image"])}
        return {task: rows.patch_means(np.asarray(out["pixel"]), patch, tile)}

    return method


def location(inputs: Mapping[str, Any], task: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Longitude and latitude as features [B, *shape, 2]."""
    where = np.stack([np.asarray(inputs[PLACE][name]) for name in ("lon", "lat")], axis=-1)
    return {task: np.broadcast_to(where.reshape(len(where), *(1,) * len(shape), 2), (len(where), *shape, 2))}


def collect(folder: pathlib.Path, data: pathlib.Path, task: str, split: str) -> tuple[rows.Rows, np.ndarray]:
    """The labelled rows of a split with every variant's features, and the grid cell each of them lies in."""
    found = networks.read_description(folder / "none")
    cfg = found.config.copy_and_resolve_references()
    tile, patch = int(dataset_records.read_metadata(data)["tile"]), int(cfg.eval.patch)
    squares = () if task == "scene" else (tile // patch,) * 2

    def some(where: pathlib.Path, methods: dict[str, rows.Method]) -> rows.Rows:
        cfg.data.dir = str(where)
        batches = whole_places.eval_batches(cfg, found.contract, split, int(cfg.eval.batch))
        return rows.collect(batches, methods, (task,), patch=patch)[task]

    with cfg.unlocked():
        here = some(
            data,
            {
                "none": features_of(folder / "none", task, patch, tile),
                "lon/lat": lambda inputs: location(inputs, task, squares),
                "bank": features_of(folder / "bank", task, patch, tile),
                "left out": features_of(folder / "bank", task, patch, tile, networks.NO_BANK),
            },
        )
        there = some(
            folder / "shuffled_data",
            {
                "shuffled": features_of(folder / "shuffled", task, patch, tile),
                "elsewhere": features_of(folder / "bank", task, patch, tile),
            },
        )
    if (here.place != there.place).any():
        raise ValueError(f"{folder}/shuffled_data is not a copy of {data}: delete it")
    lon, lat = here.features["lon/lat"].T.astype(np.float32)
    cells = regions.cell_ids(lon, lat, *regions.grid_edges(found.model.geo_context.cell))
    joined = {**here.features, **there.features}
    joined["lon/lat"] = np.concatenate([joined["none"], np.nan_to_num(joined["lon/lat"])], axis=-1)
    return here._replace(features={name: joined[name] for name in VARIANTS}), cells


def region_scores(fit: tuple[rows.Rows, np.ndarray], test: tuple[rows.Rows, np.ndarray]) -> dict[str, float]:
    """Variant -> accuracy of a linear probe that reads the grid cell of a row."""
    known = np.unique(fit[1])
    place = np.unique(fit[0].place, return_inverse=True)[1]
    score = {}
    for name in VARIANTS:
        probe = linear.linear_probe(fit[0].features[name], fit[1][:, None] == known, place, test[0].features[name])
        table = metrics.confusion((test[1][:, None] == known).argmax(1), probe.scores.argmax(1), len(known))
        score[name] = float(metrics.from_confusion(table)["accuracy"])
    return score


def chosen(fit: rows.Rows) -> str:
    """The one of CHOICE by the training rows alone, as linear_probe chooses its strength."""
    place, target = np.unique(fit.place, return_inverse=True)[1], fit.target[:, fit.target.any(0)]
    score = {name: max(linear.choose_strength(fit.features[name], target, place)[1].values()) for name in CHOICE}
    return max(reversed(CHOICE), key=score.__getitem__)  # a tie: without


def one_seed(folder: pathlib.Path, world: str, seed: int, data: pathlib.Path | None, places: int, steps: int) -> None:
    """Places, runs and scores of one seed, what is missing of them."""
    done = folder / "scores.json"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    data = data or make_places(folder, world, seed, places)
    shuffled = folder / "shuffled_data"
    if not (shuffled / dataset_records.METADATA).exists():
        shuffle_places(data, shuffled, seed)
    first = folder / "first"
    train(first, data, seed, steps)
    for name, where, settings in (("none", data, ()), ("bank", data, (BANK,)), ("shuffled", shuffled, (BANK,))):
        train(folder / name, where, seed, steps, *settings, start=first)
    task = "patch" if world == "real" else "scene"
    parts = {split: collect(folder, data, task, split) for split in ("train", "test")}
    cfg = networks.read_description(folder / "none").config
    result = compare.compare(
        parts["train"][0],
        parts["test"][0],
        k=cfg.eval.knn_k,
        temperature=cfg.eval.knn_temp,
        resamples=cfg.eval.bootstrap,
        seed=seed,
    )
    result["chosen"] = chosen(parts["train"][0])
    result["region"] = region_scores(parts["train"], parts["test"])
    with (folder / "bank" / "metrics.jsonl").open() as file:
        last = json.loads(file.readlines()[-1])
    result["steps"], result["settings"] = steps, list(SETTINGS)
    result["monitors"] = {name: value for name, value in last.items() if name.startswith("geo/")}
    print(compare.table(result, f"{world} {seed}, {task}"), flush=True)
    write_atomically(done, (json.dumps(result, indent=1) + "\n").encode())


def table(folder: pathlib.Path) -> str:
    """The scores that are there, one row per world and variant."""
    lines = [
        "| world, seeds | variant | linear probe, accuracy | over no geo-context | kNN, accuracy | region, accuracy |",
        "|---|---|---|---|---|---|",
    ]
    for world in (*WORLDS, "real"):
        scores = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{world}-*/scores.json"))]
        if not scores:
            continue

        def accuracy(probe: str, name: str, scores: list[Any] = scores) -> list[float]:
            return [
                entry["scores"]["accuracy"]["value"]
                for one in scores
                for entry in one["results"]
                if (entry["probe"], entry["method"]) == (probe, name)
            ]

        for name, text in VARIANTS.items():
            gain = [a - b for a, b in zip(accuracy("linear", name), accuracy("linear", "none"), strict=True)]
            cells = [
                f"{world}, {len(scores)}",
                text,
                mean_and_interval(accuracy("linear", name)),
                "" if name == "none" else mean_and_interval(gain),
                "" if name == "lon/lat" else mean_and_interval(accuracy("knn", name)),
                mean_and_interval([one["region"][name] for one in scores]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        picked = [accuracy("linear", one["chosen"])[n] for n, one in enumerate(scores)]
        gain = [a - b for a, b in zip(picked, accuracy("linear", "none"), strict=True)]
        count = sum(one["chosen"] == CHOICE[0] for one in scores)
        lines.append(
            f"| {world}, {len(scores)} | geo-context or left out, chosen on the training places ({count} of "
            f"{len(scores)} with it) | {mean_and_interval(picked)} | {mean_and_interval(gain)} | | |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--world", choices=(*WORLDS, "real"), default="regional")
    parser.add_argument(
        "--data", type=pathlib.Path, help="the dataset of --world real (experiments/real_samples/convert.py makes one)"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--places", type=int, default=384, help="of a synthetic world, a quarter of them held out")
    parser.add_argument("--steps", type=int, default=150, help="of 16 places, of each of the two stages")
    parser.add_argument("--table", action="store_true", help="only the table of the scores that are there")
    parser.add_argument("--out", type=pathlib.Path, help="file with the marks to write the table between")
    args = parser.parse_args()
    if (args.world == "real") != (args.data is not None) and not args.table:
        parser.error("--data DATASET goes with --world real, and only with it")
    for seed in () if args.table else args.seeds:
        one_seed(
            args.folder.resolve() / f"{args.world}-{seed}",
            args.world,
            seed,
            args.data and args.data.resolve(),
            args.places,
            args.steps,
        )
    text = table(args.folder)
    print(text)
    if args.out:
        write_between(args.out, MARKS, text)


if __name__ == "__main__":
    main()
