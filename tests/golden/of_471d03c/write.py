"""Writes this folder's files with the code of commit 471d03c, from a checkout of that commit:

    cd CHECKOUT && PYTHONPATH=. JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 python .../write.py OUT

It does not run with later code, whose modules have other names. OUT and OUT_scratch must not exist.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import sys

import numpy as np
from tests.rasters import HR, catalog, s2, write

from skysense_jax import cli, embed

SPLITS = ("train", "test")

RUNS = {
    "skysense": (
        "configs/skysense_tiny.py:series",
        {
            "model.ratio": 2,
            "model.width": 4,
            "model.s2.embed_dims": 4,
            "model.s2.num_heads": 1,
            "model.s1.embed_dims": 4,
            "model.s1.num_heads": 1,
            "model.fusion.embed_dims": 4,
            "model.fusion.num_heads": 1,
            "model.geo_context.bank": "on",
            "model.geo_context.regions": 4,
            "model.geo_context.prototypes": 2,
            "model.geo_context.width": 4,
            "objective.head.hidden": 8,
            "objective.head.bottleneck": 8,
            "objective.head.prototypes": 8,
            "objective.align_dim": 8,
        },
    ),
    "msgfm": (
        "configs/msgfm_tiny.py:hr,dsm",
        {"model.ratio": 2, "model.img_size": 8, "model.embed_dims": 4, "model.mlp_ratio": 2, "model.moe.experts": 2},
    ),
}
"""Run -> (configuration, what is smaller than there)."""

STEPS, KEPT = 3, 1
"""Steps of a run, and the step whose checkpoint is kept: the rest is done again by who continues it."""


def write_rasters(root: pathlib.Path, places: int = 6) -> pathlib.Path:
    """Noise as GeoTIFFs, and their catalog: S2 of two dates, HR; S1 and a surface model at some places."""
    rng = np.random.default_rng(471)
    rows = []
    for number in range(places):
        name, west = f"p{number}", 300_000 + 1000 * number
        for day in ("2021-05-01", "2021-03-01"):
            image = rng.integers(100, 5000, (3, 8, 8)).astype(np.uint16)
            file = write(root / name / f"s2_{day}.tif", image, west=west)
            rows.append(s2(f"{name}/{file.name}", day, place=name, bands="B03,B04,B08"))
        if number % 3:
            write(root / name / "s1.tif", rng.uniform(-25, -5, (2, 8, 8)).astype(np.float32), west=west)
            s1 = {"sensor": "s1", "datetime": "2021-04-01", "path": f"{name}/s1.tif", "bands": "VV,VH", "units": "db"}
            rows.append({"place": name} | s1)
        if number % 2:
            write(root / name / "dsm.tif", rng.uniform(0, 90, (16, 16)).astype(np.float32), west=west, step=5)
            rows.append({"place": name, "sensor": "dsm", "path": f"{name}/dsm.tif"})
        write(root / name / "hr.tif", rng.integers(0, 256, (3, 16, 16)).astype(np.uint8), west=west, step=5)
        rows.append({"place": name} | HR | {"path": f"{name}/hr.tif"})
        rows.append({"place": name, "sensor": "label", "classes": ("even", "odd")[number % 2]})
    return catalog(root, rows)


def command(*words: object) -> None:
    code = cli.main([str(word) for word in words])
    if code != 0:
        raise SystemExit(f"{words} ended with {code}")


def record_digests(folder: pathlib.Path) -> dict[str, list[dict[str, str]]]:
    """Split -> its records in order, each field as the SHA-256 of its dtype, shape and bytes."""
    import tensorflow_datasets as tfds

    dataset = tfds.builder_from_directory(str(folder))

    def digest(value: object) -> str:
        array = np.asarray(value)
        if array.dtype.kind in "OS":
            return hashlib.sha256(bytes(array.item())).hexdigest()[:16]
        head = f"{array.dtype.str} {array.shape} ".encode()
        return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:16]

    return {
        split: [{name: digest(row[name]) for name in sorted(row)} for row in dataset.as_data_source(split=split)]
        for split in SPLITS
    }


def features_input(contract: dict) -> dict:
    """A fixed place of 8 x 8 base pixels: every sensor of the contract, two dates where it has dates."""
    rng = np.random.default_rng(7)
    place = {}
    for name, rule in sorted(contract["sensors"].items()):
        side, dates = (16, 1) if rule["grid"] == "hr" else (8, 2)
        noise = rng.uniform(-1, 1, (dates, side, side, len(rule["bands"])))
        image = np.asarray(rule["mean"]) + 0.5 * np.asarray(rule["std"]) * noise
        place[name] = {"image": image.astype(np.float32), "dates": ["2021-03-01", "2021-08-15"][:dates]}
    return place


def features(path: pathlib.Path) -> dict[str, np.ndarray]:
    loaded = embed.load(path)
    place = features_input(loaded.contract)
    inputs = {f"input.{name}": entry["image"] for name, entry in place.items()}
    if "geo_context" in loaded.config.model and loaded.config.model.geo_context.bank != "none":
        place["place"] = {"lon": 0.55, "lat": 45.1}
    return inputs | {f"output.{name}": value for name, value in loaded.features(place).items()}


def main(out: pathlib.Path) -> None:
    scratch = out.with_name(out.name + "_scratch")
    data = out / "dataset"
    rasters = write_rasters(scratch / "rasters")
    command("data", "build", "--catalog", rasters, "--out", data, "--tile", 8, "--ratio", 2, "--holdout", 0.2)
    command("data", "stats", data)
    (out / "records.json").write_text(json.dumps(record_digests(data), indent=1) + "\n")
    settings = {}
    for name, (config, smaller) in RUNS.items():
        work, home = scratch / name, out / name
        home.mkdir()
        fields = {**smaller, "data.batch": 8, "steps": STEPS, "run.save_every": 1, "run.keep": 9}
        settings[name] = {"config": config, "fields": fields}
        flags = [f"--config.{field}={value}" for field, value in {**fields, "data.dir": data}.items()]
        command("train", "--config", config, "--workdir", work, *flags)
        shutil.copytree(work / "checkpoints" / str(KEPT), home / "workdir" / "checkpoints" / str(KEPT))
        lines = (work / "metrics.jsonl").read_text().splitlines(keepends=True)
        (home / "metrics.jsonl").write_text("".join(lines))
        command("export-torch", home / "workdir", "--out", home / "export")
        file, _, variant = config.partition(":")
        (scratch / f"{name}.py").write_text(
            "import runpy\n\n\ndef get_config():\n"
            f"    c = runpy.run_path({file!r})['get_config']({variant!r})\n"
            f"    c.update_from_flattened_dict({smaller!r})\n    return c\n"
        )
        command(
            "import-torch",
            home / "export" / "model.safetensors",
            "--config",
            scratch / f"{name}.py",
            "--out",
            home / "imported",
            "--licence",
            "Apache-2.0",
        )
        stored = features(home / "workdir")
        np.savez_compressed(home / "features.npz", **stored)
        for kind in ("export", "imported"):
            for key, value in features(home / kind).items():
                np.testing.assert_array_equal(value, stored[key], err_msg=f"{kind} {key}")
    (out / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
    files = sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    sums = [f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    (out / "SHA256SUMS").write_text("".join(sums))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute())
