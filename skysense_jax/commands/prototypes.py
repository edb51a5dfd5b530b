"""`skysense-jax prototypes`: what the bank of a network holds for a region, and what it says about places there.

Of the bank alone: which region, how often it was visited, how its prototypes are used, which are alike. With a dataset:
the cells of the region's places (all splits; no label is used) go to the prototype of the greatest cosine similarity,
in the bank's space, by the network that features are taken from (the teacher of a run). That gives shares, the places
nearest to every prototype, the agreement with the label map beside that of k-means of the same features with as many
clusters, and for one place a picture and a GeoTIFF.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from skysense_jax import evaluation, networks
from skysense_jax.core.config import read_config
from skysense_jax.core.files import write_atomically
from skysense_jax.data import records
from skysense_jax.draw import prototype_map
from skysense_jax.evals import region
from skysense_jax.models import skysense as models


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    # Otherwise "-60.5,-20" would be taken for an option before Python 3.14, whose rule this is.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    parser.add_argument("path", help="workdir, checkpoint or exported folder of a network with geo-context")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--region", metavar="LON,LAT", help="the region that holds this location, degrees")
    what.add_argument("--map", metavar="PLACE", help="the region of this place (id or number), and maps of it in --out")
    parser.add_argument("--data", help="dataset written by `data build`: what its places in the region are assigned to")
    parser.add_argument("--out", help="folder for the report as JSON, and with --map for PLACE.png and PLACE.tif")
    parser.add_argument(
        "--config",
        help="configuration whose data.eval_dates and eval section are used instead of the run's; needed "
        "for weights that were not trained here",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of k-means")


def run(args: argparse.Namespace) -> int:
    """Reports on a region, prints it, writes what --out asks for."""
    if args.map is not None and (args.data is None or args.out is None):
        raise ValueError("--map PLACE needs --data DATASET, where the place is, and --out DIR, where its maps go")
    network = networks.open_network(args.path)
    bank = networks.bank_of(network)
    record = None
    if args.map is None:
        where = location(args.region)
    else:
        record, _ = records.read_place(args.data, args.map)
        where = float(record["lon"]), float(record["lat"])
    found = network.description
    side = models.region_side(found.model.geo_context)
    row = region.region_at(bank, *where, side)
    report: dict[str, Any] = {
        "command": shlex.join(["skysense-jax", *sys.argv[1:]]),
        "network": {"path": str(args.path), "kind": found.kind, "step": found.step},
        **region.region_report(bank, row, region.plain_cell(bank, *where), float(found.model.geo_context.cell)),
    }
    if args.data is not None:
        config = None if args.config is None else read_config(args.config)
        seen = evaluation.places_in_region(network, bank, evaluation.settings(found, config, args.data), row)
        own, clusters = region.assigned(seen, bank["prototypes"][row], args.seed)
        report["data"] = data_report(args.data, seen, own, bank["prototypes"][row], args.seed)
        report["agreement"] = {"region": region.agreement(seen, own, clusters, slice(None))}
        if record is not None:
            number = seen.names.index(records.as_text(record["place"]))
            report["agreement"]["place"] = region.agreement(seen, own, clusters, slice(number, number + 1))
    print(text(report))
    if args.out:
        stem = pathlib.Path(args.out) / (f"region_{row}" if record is None else records.as_text(record["place"]))
        stem.parent.mkdir(parents=True, exist_ok=True)
        if record is not None:
            write_maps(stem, report, record, *(one[number].reshape(seen.grid) for one in (own, clusters)))
        write_atomically(pathlib.Path(f"{stem}.json"), (json.dumps(report, indent=1) + "\n").encode())
        print(f"written: {stem}.json" + (f", {stem}.png, {stem}.tif" if record is not None else ""))
    return 0


def location(words: str) -> tuple[float, float]:
    """(longitude, latitude) of "LON,LAT"; ValueError where that is no location."""
    parts = words.split(",")
    try:
        lon, lat = (float(part) for part in parts)
    except ValueError:
        raise ValueError(f"--region {words!r}: give LON,LAT in degrees, as 11.5,48.1") from None
    if not (abs(lon) <= 360 and abs(lat) <= 90):
        raise ValueError(f"--region {words!r}: longitude first, -180..180, then latitude, -90..90")
    return lon, lat


def data_report(folder: str, seen: region.Seen, own: np.ndarray, prototypes: np.ndarray, seed: int) -> dict[str, Any]:
    """Which dataset it is, and what the region's places say about its prototypes; JSON-able."""
    meta = records.read_metadata(folder)
    dataset = {"dir": str(folder), "dataset_id": meta.get("dataset_id"), "synthetic": bool(meta.get("synthetic"))}
    return dataset | region.data_report(seen, own, prototypes, seed)


def write_maps(
    stem: pathlib.Path, report: Mapping[str, Any], record: Mapping[str, Any], own: np.ndarray, clusters: np.ndarray
) -> None:
    """STEM.png and STEM.tif of a place. own, clusters: uint16 [h, w]."""
    meta, count = records.read_metadata(report["data"]["dir"]), len(report["prototypes"])
    scores = {name: report["agreement"]["place"][name] for name in ("prototypes", "kmeans")}
    said = {name: "" if value is None else f"  AMI {value:.2f}" for name, value in scores.items()}
    picture = prototype_map.draw(
        record,
        meta,
        {f"prototype{said['prototypes']}": own, f"k-means{said['kmeans']}": clusters},
        count,
        f"{records.as_text(record['place'])}   lon {float(record['lon']):.4f} lat {float(record['lat']):.4f}   region "
        f"{report['region']['row']}, {count} prototypes   AMI: with the label map of this place",
    )
    picture.save(f"{stem}.png", optimize=True)
    tags = {"SKYSENSE_REGION": str(report["region"]["row"]), "SKYSENSE_STEP": str(report["network"]["step"])}
    prototype_map.write_geotiff(f"{stem}.tif", own, record, tags | prototype_map.synthetic_tag(meta))


def text(report: Mapping[str, Any]) -> str:
    """The report as it is printed."""
    network, region, bank, data = (report.get(name) for name in ("network", "region", "bank", "data"))
    west, south, east, north = region["bounds"]
    count = len(report["prototypes"])
    lines = [
        f"network  {network['path']} ({network['kind']}, step {network['step']})",
        f"region   row {region['row']} (visited regions: {region['visited_regions']}): lon {west:.3f}..{east:.3f}, "
        f"lat {south:.3f}..{north:.3f}, {region['side_m'] / 1000:g} km square"
        f"{', shared with distant ones' * region['shared']}; {region['visits']} visits",
        f"bank     entropy of the usage {bank['usage_entropy']:.3f} of log {count}; similarity of two prototypes: mean "
        f"{bank['similarity_mean']:.3f}, greatest {bank['similarity_max']:.3f}; directions {bank['directions']:.1f} "
        f"of {count}",
    ]
    if data:
        lines.append(
            f"places   {data['dir']}: {data['places']} in the region, {data['cells']} cells; entropy of the shares "
            f"{data['share_entropy']:.3f}; mean cosine with the prototype {data['fit']:.3f}"
        )
    header = f"{'prototype':>9}{'usage':>9}{'most like':>16}"
    lines += ["", header + (f"{'share':>9}  nearest places: cosine of their best cell (lon, lat)" if data else "")]
    for one in report["prototypes"]:
        line = f"{one['number']:>9}{one['usage']:>9.1%}{one['like']:>9} ({one['like_cosine']:.2f})"
        if data:
            places = (
                f"{near['place']} {near['cosine']:.3f} ({near['lon']:.3f}, {near['lat']:.3f})"
                for near in data["nearest"][one["number"]]
            )
            line += f"{data['share'][one['number']]:>9.1%}  " + "; ".join(places)
        lines.append(line)
    lines += ["", "usage: moving average over pretraining's views, the share of cells nearest to a prototype"]
    if data:
        lines += [
            "",
            f"adjusted mutual information with the label map   (k-means: {count} clusters, same features, "
            f"seed {data['kmeans_seed']})",
            f"{'':<12}{'cells':>8}{'classes':>9}{'prototypes':>12}{'k-means':>9}",
        ]
        for name, row in report["agreement"].items():
            scores = ["-" if row[one] is None else f"{row[one]:.3f}" for one in ("prototypes", "kmeans")]
            lines.append(f"{name:<12}{row['cells']:>8}{row['classes']:>9}{scores[0]:>12}{scores[1]:>9}")
        if data["synthetic"]:
            lines += ["", "SYNTHETIC DATA: these numbers test the pipeline, they say nothing about the Earth."]
    return "\n".join(lines)
