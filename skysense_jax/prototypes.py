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
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from skysense_jax import embed, evaluate
from skysense_jax.data import pipeline, preview, prototype_map, sources
from skysense_jax.data.parts import write_atomically
from skysense_jax.evals import assignment
from skysense_jax.models import skysense as models
from skysense_jax.ops import prototypes as banks
from skysense_jax.ops import regions
from skysense_jax.sensors import UNLABELLED

NEAREST = 3
"""Places named for every prototype, and regions named where one is not known."""


class Seen(NamedTuple):
    """The M places of a region. features: unit float32 [M, N, D] in the bank's space, N = h * w cells in the shape
    `grid`; valid: bool [M, N], any input there; label: uint8 [M, N]; names: M texts; lon, lat: [M]."""

    features: np.ndarray
    valid: np.ndarray
    label: np.ndarray
    names: list[str]
    lon: np.ndarray
    lat: np.ndarray
    grid: tuple[int, int]


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
    network = embed.open_network(args.path)
    bank = bank_of(network)
    record = None
    if args.map is None:
        where = location(args.region)
    else:
        record, _ = preview.read_place(args.data, args.map)
        where = float(record["lon"]), float(record["lat"])
    found = network.description
    side = models.region_side(found.model.geo_context)
    row = region_at(bank, *where, side)
    report: dict[str, Any] = {
        "command": shlex.join(["skysense-jax", *sys.argv[1:]]),
        "network": {"path": str(args.path), "kind": found.kind, "step": found.step},
        **region_report(bank, row, plain_cell(bank, *where), float(found.model.geo_context.cell)),
    }
    if args.data is not None:
        config = None if args.config is None else embed.read_config(args.config)
        seen = places_of(network, bank, evaluate.settings(found, config, args.data), row)
        own, clusters = assigned(seen, bank["prototypes"][row], args.seed)
        report["data"] = data_report(args.data, seen, own, bank["prototypes"][row], args.seed)
        report["agreement"] = {"region": agreement(seen, own, clusters, slice(None))}
        if record is not None:
            number = seen.names.index(preview.as_text(record["place"]))
            report["agreement"]["place"] = agreement(seen, own, clusters, slice(number, number + 1))
    print(text(report))
    if args.out:
        stem = pathlib.Path(args.out) / (f"region_{row}" if record is None else preview.as_text(record["place"]))
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


def bank_of(network: embed.Network) -> dict[str, np.ndarray]:
    """The prototype bank of a network as numpy arrays; ValueError where it has none."""
    bank = network.encoder.get("geo", {}).get("bank")
    if bank is None:
        raise ValueError(f"{network.description.path} has no prototype bank: its model has no geo-context")
    return {name: np.asarray(leaf) for name, leaf in bank.items()}


def plain_cell(bank: Mapping[str, np.ndarray], lon: float, lat: float, side: int = regions.ALONE) -> int:
    """Cell of the bank's grid at a location; `side` as in regions.cell_ids."""
    return int(regions.cell_ids(np.float32([lon]), np.float32([lat]), bank["lon_edges"], bank["lat_edges"], side)[0])


def region_at(bank: Mapping[str, np.ndarray], lon: float, lat: float, side: int = regions.ALONE) -> int:
    """Row of the region a location lies in. ValueError where that was never visited, naming the nearest known ones
    unless cells share regions (`side` as in regions.cell_ids)."""
    edges, cell = (bank["lon_edges"], bank["lat_edges"]), plain_cell(bank, lon, lat, side)
    known = np.flatnonzero((bank["cells"] != regions.NOWHERE) & (bank["visits"] > 0))
    row = known[bank["cells"][known] == cell]
    if len(row):
        return int(row[0])
    if not len(known):
        raise ValueError("no region of the bank has ever been visited: its network was not pretrained with the bank on")
    if cell == regions.NOWHERE:
        raise ValueError(f"lon {lon:g} lat {lat:g} is no location: the place's is missing")
    if side != regions.ALONE:
        raise ValueError(
            f"the region that lon {lon:g} lat {lat:g} shares with other squares (table='hashed') has "
            f"never been visited; {len(known)} of {len(bank['cells'])} have"
        )
    centres = np.array([regions.cell_centre(one, *edges) for one in bank["cells"][known]])
    away = _distance(lon, lat, *centres.T)
    nearest = np.argsort(away, kind="stable")[:NEAREST]
    raise ValueError(
        f"lon {lon:g} lat {lat:g} lies in no region that the bank has visited ({len(known)} are); the nearest: "
        + "; ".join(f"{centres[k, 0]:.4f},{centres[k, 1]:.4f} ({away[k]:.0f} km away)" for k in nearest)
    )


def _distance(lon: float, lat: float, lons: np.ndarray, lats: np.ndarray) -> np.ndarray:
    """Kilometres along great circles."""
    a, b, dlon = np.radians(lat), np.radians(lats), np.radians(lons - lon)
    half = np.sin((b - a) / 2) ** 2 + np.cos(a) * np.cos(b) * np.sin(dlon / 2) ** 2
    return 2 * regions.RADIUS / 1000 * np.arcsin(np.sqrt(np.minimum(half, 1)))


def region_report(bank: Mapping[str, np.ndarray], row: int, cell: int, side: float) -> dict[str, Any]:
    """What the bank itself says about a region, JSON-able. cell: the one of its cells that is shown; side: metres of a
    cell of the grid."""
    edges = bank["lon_edges"], bank["lat_edges"]
    own = assignment.unit(bank["prototypes"][row])
    cosine = own @ own.T
    pairs = cosine[~np.eye(len(own), dtype=bool)]
    others = np.where(np.eye(len(own), dtype=bool), -np.inf, cosine)
    return {
        "region": {
            "row": row,
            "cell": cell,
            "centre": regions.cell_centre(cell, *edges),
            "bounds": regions.cell_bounds(cell, *edges),
            "side_m": side,
            "visits": int(bank["visits"][row]),
            "shared": regions.is_shared(bank["cells"]),
            "visited_regions": int(np.sum(bank["visits"] > 0)),
        },
        "bank": {
            "usage_entropy": assignment.entropy(bank["usage"][row]),
            "similarity_mean": float(pairs.mean()),
            "similarity_max": float(pairs.max()),
            "directions": float(banks.directions(own)),
        },
        "prototypes": [
            {
                "number": k,
                "usage": float(bank["usage"][row, k]),
                "like": int(others[k].argmax()),
                "like_cosine": float(others[k].max()),
            }
            for k in range(len(own))
        ],
        "similarity": np.round(cosine, 4).tolist(),
    }


def places_of(network: embed.Network, bank: Mapping[str, np.ndarray], cfg: Any, row: int) -> Seen:
    """The places of a dataset that lie in a region, encoded. cfg: of `evaluate.settings`. ValueError: there is none."""
    found = network.description
    model, size = models.make_model(found.model, found.contract), int(cfg.eval.batch)
    width, side = found.model.fusion.embed_dims, models.region_side(found.model.geo_context)

    @jax.jit
    def forward(encoder: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
        out = model.apply(encoder, inputs)
        return model.query(encoder, out["fused"][..., :width]), out["fused_mask"]

    encoder = jax.tree.map(jax.numpy.asarray, models.with_bank(network.encoder, None))  # to the device once
    parts: list[dict[str, Any]] = []
    for split in sources.splits(cfg.data.dir):
        lon, lat = sources.locations(cfg.data.dir, split)
        ids = regions.cell_ids(lon, lat, bank["lon_edges"], bank["lat_edges"], side)
        chosen = np.flatnonzero(ids == bank["cells"][row])
        batches = pipeline.eval_batches(cfg, found.contract, split, size, chosen)
        for batch in tqdm(batches, total=-(-len(chosen) // size), desc=f"places of the region, {split}", unit="batch"):
            real = batch["weight"] > 0
            query, mask = (np.asarray(one)[real] for one in forward(encoder, batch["sensors"]))
            parts.append(
                {
                    "query": assignment.unit(query).astype(np.float32),
                    "mask": mask > 0,
                    "label": batch["label_map"][real],
                    "names": batch["place"]["name"][real],
                    "lon": batch["place"]["lon"][real],
                    "lat": batch["place"]["lat"][real],
                }
            )
    if not parts:
        raise ValueError(f"{cfg.data.dir} has no place in this region")
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    count, grid = len(joined["mask"]), joined["mask"].shape[1:]
    return Seen(
        joined["query"].reshape(count, grid[0] * grid[1], -1),
        joined["mask"].reshape(count, -1),
        joined["label"].reshape(count, -1),
        [str(name) for name in joined["names"]],
        joined["lon"],
        joined["lat"],
        grid,
    )


def assigned(seen: Seen, prototypes: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Prototype and k-means cluster of every cell: uint16 [M, N] each, NODATA where nothing is valid. k-means has as
    many clusters as there are prototypes [P, D] and is fitted to all valid cells; its clusters are numbered like the
    prototypes whose cells they share, for the eye alone.
    """
    own, clusters = (np.full(seen.valid.shape, prototype_map.NODATA, np.uint16) for _ in range(2))
    nearest = (seen.features[seen.valid] @ assignment.unit(prototypes).T).argmax(-1)
    own[seen.valid] = nearest
    found = assignment.kmeans(seen.features[seen.valid], len(prototypes), seed)
    clusters[seen.valid] = assignment.matched(found, nearest, len(prototypes))
    return own, clusters


def data_report(folder: str, seen: Seen, own: np.ndarray, prototypes: np.ndarray, seed: int) -> dict[str, Any]:
    """What the region's places say about its prototypes, JSON-able."""
    meta, count = sources.read_metadata(folder), len(prototypes)
    cosine = seen.features @ assignment.unit(prototypes).T
    share = assignment.shares(own[seen.valid], count)
    order, best = assignment.best_of_places(cosine, seen.valid, NEAREST)
    return {
        "dir": str(folder),
        "dataset_id": meta.get("dataset_id"),
        "synthetic": bool(meta.get("synthetic")),
        "places": len(seen.names),
        "cells": int(seen.valid.sum()),
        "kmeans_seed": seed,
        "fit": float(cosine.max(-1)[seen.valid].mean()),
        "share_entropy": assignment.entropy(share),
        "share": share.tolist(),
        "nearest": [
            [
                {"place": seen.names[m], "lon": float(seen.lon[m]), "lat": float(seen.lat[m]), "cosine": float(value)}
                for m, value in zip(order[k], best[k])
                if np.isfinite(value)
            ]
            for k in range(count)
        ],
    }


def agreement(seen: Seen, own: np.ndarray, clusters: np.ndarray, places: slice) -> dict[str, Any]:
    """Adjusted mutual information with the label map over the labelled valid cells of some places; None where they
    have fewer than two classes."""
    valid = seen.valid[places]
    label, own, clusters = (one[places][valid] for one in (seen.label, own, clusters))
    labelled = label[label != UNLABELLED]
    return {
        "cells": len(labelled),
        "classes": len(np.unique(labelled)),
        "prototypes": assignment.agreement(own, label),
        "kmeans": assignment.agreement(clusters, label),
    }


def write_maps(
    stem: pathlib.Path, report: Mapping[str, Any], record: Mapping[str, Any], own: np.ndarray, clusters: np.ndarray
) -> None:
    """STEM.png and STEM.tif of a place. own, clusters: uint16 [h, w]."""
    meta, count = sources.read_metadata(report["data"]["dir"]), len(report["prototypes"])
    scores = {name: report["agreement"]["place"][name] for name in ("prototypes", "kmeans")}
    said = {name: "" if value is None else f"  AMI {value:.2f}" for name, value in scores.items()}
    picture = prototype_map.draw(
        record,
        meta,
        {f"prototype{said['prototypes']}": own, f"k-means{said['kmeans']}": clusters},
        count,
        f"{preview.as_text(record['place'])}   lon {float(record['lon']):.4f} lat {float(record['lat']):.4f}   region "
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
