"""`skysense-jax prototypes`: what the bank of a network holds for a region, and what it says about places there.

Of the bank alone: which region it is, how often it was visited, how its prototypes are used and which are alike.
With a dataset, the cells of the region's places (all splits; no label is used) go to the prototype of the greatest
cosine similarity in the bank's space, by the network that features are taken from (the teacher of a run). That gives
shares, the places nearest to every prototype, the agreement with the label map beside that of k-means of the same
features with as many clusters, and for one place a picture and a GeoTIFF.
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
from skysense_jax.core import exits
from skysense_jax.core.config import read_config
from skysense_jax.core.files import write_atomically
from skysense_jax.data import records
from skysense_jax.draw import prototype_map
from skysense_jax.evals import region
from skysense_jax.models import skysense


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    # Otherwise "-60.5,-20" would be taken for an option before Python 3.14, whose rule this is. The attribute is
    # private: a test fails where argparse no longer has it.
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
    """Reports on a region, prints the report, writes what --out asks for.

    Raises:
        ValueError: options contradict, the network has no prototype bank, or no region holds the location.
    """
    if args.map is not None and (args.data is None or args.out is None):
        raise ValueError("--map PLACE needs --data DATASET, where the place is, and --out DIR, where its maps go")
    network = networks.open_network(args.path)
    bank = networks.bank_of(network)
    record = None
    if args.map is None:
        lon, lat = location(args.region)
    else:
        record, _ = records.read_place(args.data, args.map)
        lon, lat = float(record["lon"]), float(record["lat"])
    description = network.description
    side = skysense.region_side(description.model.geo_context)
    row = region.region_at(bank, lon, lat, side)
    report: dict[str, Any] = {
        "command": shlex.join(["skysense-jax", *sys.argv[1:]]),
        "network": {"path": str(args.path), "kind": description.kind, "step": description.step},
        **region.region_report(bank, row, region.plain_cell(bank, lon, lat), float(description.model.geo_context.cell)),
    }
    if args.data is not None:
        config = None if args.config is None else read_config(args.config)
        cfg = evaluation.settings(description, config, args.data)
        encoded = evaluation.places_in_region(network, bank, cfg, row)
        assigned, clusters = region.assigned(encoded, bank["prototypes"][row], args.seed)
        report["data"] = dataset_facts(args.data) | region.data_report(
            encoded, assigned, bank["prototypes"][row], args.seed
        )
        report["agreement"] = {"region": region.agreement(encoded, assigned, clusters, slice(None))}
        if record is not None:
            number = encoded.names.index(records.as_text(record["place"]))
            report["agreement"]["place"] = region.agreement(encoded, assigned, clusters, slice(number, number + 1))
            maps = (assigned[number].reshape(encoded.grid), clusters[number].reshape(encoded.grid))
    print(text(report))
    if args.out:
        stem = pathlib.Path(args.out) / (f"region_{row}" if record is None else records.as_text(record["place"]))
        stem.parent.mkdir(parents=True, exist_ok=True)
        if record is not None:
            write_maps(stem, report, record, *maps)
        write_atomically(pathlib.Path(f"{stem}.json"), (json.dumps(report, indent=1) + "\n").encode())
        print(f"written: {stem}.json" + (f", {stem}.png, {stem}.tif" if record is not None else ""))
    return exits.DONE


def location(words: str) -> tuple[float, float]:
    """(longitude, latitude) of "LON,LAT", degrees.

    Raises:
        ValueError: that is no location.
    """
    try:
        lon, lat = (float(number) for number in words.split(","))
    except ValueError:
        raise ValueError(f"--region {words!r}: give LON,LAT in degrees, as 11.5,48.1") from None
    if not (abs(lon) <= 360 and abs(lat) <= 90):
        raise ValueError(f"--region {words!r}: longitude first, -180..180, then latitude, -90..90")
    return lon, lat


def dataset_facts(folder: str) -> dict[str, Any]:
    """Which dataset it is, JSON-able."""
    meta = records.read_metadata(folder)
    return {"dir": str(folder), "dataset_id": meta.get("dataset_id"), "synthetic": bool(meta.get("synthetic"))}


def write_maps(
    stem: pathlib.Path, report: Mapping[str, Any], record: records.Record, assigned: np.ndarray, clusters: np.ndarray
) -> None:
    """Writes STEM.png and STEM.tif of a place.

    Args:
        stem: path of the files without their endings.
        report: of the command.
        record: of the place.
        assigned: number of the prototype of each cell, uint16 [h, w].
        clusters: number of the k-means cluster of each cell, uint16 [h, w].
    """
    meta, count = records.read_metadata(report["data"]["dir"]), len(report["prototypes"])
    scores = {name: report["agreement"]["place"][name] for name in ("prototypes", "kmeans")}
    said = {name: "" if value is None else f"  AMI {value:.2f}" for name, value in scores.items()}
    picture = prototype_map.draw(
        record,
        meta,
        {f"prototype{said['prototypes']}": assigned, f"k-means{said['kmeans']}": clusters},
        count,
        f"{records.as_text(record['place'])}   lon {float(record['lon']):.4f} lat {float(record['lat']):.4f}   region "
        f"{report['region']['row']}, {count} prototypes   AMI: with the label map of this place",
    )
    picture.save(f"{stem}.png", optimize=True)
    tags = {"SKYSENSE_REGION": str(report["region"]["row"]), "SKYSENSE_STEP": str(report["network"]["step"])}
    prototype_map.write_geotiff(f"{stem}.tif", assigned, record, tags | prototype_map.synthetic_tag(meta))


def text(report: Mapping[str, Any]) -> str:
    """The report as it is printed."""
    network, place, bank = report["network"], report["region"], report["bank"]
    data: Mapping[str, Any] = report.get("data", {})
    west, south, east, north = place["bounds"]
    shared = ", shared with distant ones" if place["shared"] else ""
    count = len(report["prototypes"])
    lines = [
        f"network  {network['path']} ({network['kind']}, step {network['step']})",
        f"region   row {place['row']} (visited regions: {place['visited_regions']}): lon {west:.3f}..{east:.3f}, "
        f"lat {south:.3f}..{north:.3f}, {place['side_m'] / 1000:g} km square{shared}; {place['visits']} visits",
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
    for prototype in report["prototypes"]:
        number = prototype["number"]
        line = f"{number:>9}{prototype['usage']:>9.1%}{prototype['like']:>9} ({prototype['like_cosine']:.2f})"
        if data:
            places = (
                f"{nearest['place']} {nearest['cosine']:.3f} ({nearest['lon']:.3f}, {nearest['lat']:.3f})"
                for nearest in data["nearest"][number]
            )
            line += f"{data['share'][number]:>9.1%}  " + "; ".join(places)
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
            scores = ["-" if row[method] is None else f"{row[method]:.3f}" for method in ("prototypes", "kmeans")]
            lines.append(f"{name:<12}{row['cells']:>8}{row['classes']:>9}{scores[0]:>12}{scores[1]:>9}")
        if data["synthetic"]:
            lines += ["", "SYNTHETIC DATA: these numbers test the pipeline, they say nothing about the Earth."]
    return "\n".join(lines)
