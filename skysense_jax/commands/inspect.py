"""`skysense-jax inspect`: what a folder or a configuration is, and what input its network expects.

The folder is a dataset, a workdir, a checkpoint, an exported folder or imported weights.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
from collections.abc import Mapping

import jax
from ml_collections import config_dict

from skysense_jax import networks
from skysense_jax.core import exits, paths
from skysense_jax.core.config import read_config
from skysense_jax.core.trees import Tree
from skysense_jax.data import records
from skysense_jax.models import msgfm, systems
from skysense_jax.run import plan as plans
from skysense_jax.sensors import SENSORS, Contract, input_contract, on_fine_grid

KIND_NAMES = {
    "workdir": "workdir (newest checkpoint)",
    "checkpoint": "checkpoint",
    "export": "exported weights",
    "imported": "imported weights",
}
COUNTED_WITH = "hr"
"""The sensor whose patch embedding papers count with an encoder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("path", nargs="?", help="dataset, workdir, checkpoint or exported folder")
    parser.add_argument(
        "--config",
        help="configuration file (.py): parameters per module and the input it would expect, nothing allocated",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the description.

    Raises:
        ValueError: neither a path nor a configuration was given; as :func:`describe` and :func:`describe_config`.
    """
    if args.path is None and args.config is None:
        raise ValueError("give a path, or --config FILE")
    texts = [describe(args.path)] if args.path is not None else []
    if args.config is not None:
        texts.append(describe_config(args.config))
    print("\n\n".join(texts))
    return exits.DONE


def describe(path: str | pathlib.Path) -> str:
    """The text for a folder; a ValueError where it is none of the kinds."""
    kind = networks.identify(path)
    if kind == networks.DATASET:
        return describe_dataset(paths.path(path))
    description = networks.read_description(path)
    lines = [f"{KIND_NAMES[kind]}  {description.path}"]
    lines += [f"  {name:<14}{value}" for name, value in description.provenance.items()]
    if kind in ("export", "imported") or description.config is None:
        shapes = systems.system_of(description.model).param_shapes(description.model, description.contract)
        counted = parameters({"weights": {"encoder": shapes}})
    else:
        counted = parameters(plans.abstract(description.config, description.contract))
    return "\n".join([*lines, "", counted, "", contract_table(description.contract)])


def contract_table(contract: Contract) -> str:
    """What a model expects of every sensor, band by band."""
    lines = [
        f"input expected: {contract['ratio']} HR pixels along one base pixel; raw values in these units, "
        "bands in this order"
    ]
    for name, rule in contract["sensors"].items():
        row = SENSORS[name]
        grid = "fine grid (one base pixel = ratio x ratio)" if on_fine_grid(rule) else "base grid"
        dates = "dated acquisitions" if row.dated else "no date needed"
        lines.append(
            f"  {name}: [dates, rows, columns, {len(rule['bands'])}], {rule['unit']}, {grid}, "
            f"about {rule['gsd']:g} m, {dates}"
        )
        lines.append(f"    {'band':<8}{'mean':>12}{'std':>12}")
        lines += [
            f"    {band:<8}{mean:>12.4f}{std:>12.4f}"
            for band, mean, std in zip(rule["bands"], rule["mean"], rule["std"], strict=True)
        ]
        lines += [
            f"    {key}: {rule[field]}"
            for key, field in (("statistics", "statistics_source"), ("datum", "datum"), ("missing", "missing"))
            if field in rule
        ]
    return "\n".join(lines)


def describe_dataset(folder: pathlib.Path) -> str:
    """A dataset of places, from its metadata and the record counts of its splits."""
    meta = records.read_metadata(folder)
    side = f"{meta['tile'] * meta['gsd']:g} m" if meta.get("gsd") else "unknown size"
    lines = [f"dataset  {folder}" + ("   SYNTHETIC DATA" if meta.get("synthetic") else "")]
    facts = {
        "id": meta.get("dataset_id"),
        "catalog sha256": meta.get("catalog_sha256"),
        "places": ", ".join(f"{name} {count}" for name, count in split_sizes(folder).items())
        or "none: the build did not finish",
        "tile": f"{meta['tile']} x {meta['tile']} base pixels ({side}), {meta['ratio']} HR pixels along one base pixel",
        "georeferenced": "yes" if meta.get("georeferenced", True) else "no: for the msGFM objective only",
        "scene labels": ", ".join(meta.get("label_classes") or ()) or "none",
        "label map": ", ".join(f"{key}={value}" for key, value in (meta.get("label_map_classes") or {}).items())
        or "none",
    }
    lines += [f"  {name:<16}{value}" for name, value in facts.items()]
    for name in meta["sensors"]:
        row = SENSORS[name]
        lines.append(f"  {name:<16}{row.unit}, {row.dtype}, bands {', '.join(row.bands)}")
        statistics = (meta.get("statistics") or {}).get(name)
        if statistics:
            lines.append(
                f"  {'':<16}its own statistics, {statistics['date']}, sha256 {str(statistics['sha256'])[:12]}; "
                "n = 0: the table's value"
            )
            columns = zip(row.bands, statistics["mean"], statistics["std"], statistics["n"], strict=True)
            lines += [f"  {'':<18}{band:<8}{mean:>12.4f}{std:>12.4f}   n {n:,}" for band, mean, std, n in columns]
        else:
            lines.append(f"  {'':<16}no statistics of its own (`skysense-jax data stats`); the table's: {row.source}")
    return "\n".join(lines)


def split_sizes(folder: pathlib.Path) -> dict[str, int]:
    """Records per split, from the TFDS metadata; empty where the build did not finish."""
    path = folder / "dataset_info.json"
    if not path.is_file():
        return {}
    return {
        split["name"]: sum(int(length) for length in split["shardLengths"])
        for split in json.loads(path.read_text()).get("splits", ())
    }


def describe_config(path: str) -> str:
    """A configuration file: parameters per module and input contract, through shapes only."""
    config = read_config(path)
    contract = input_contract(config.data.bands.to_dict(), config.model.ratio)
    title = f"configuration  {path}  ({config.steps} steps of {config.data.batch} places)"
    counted = parameters(plans.abstract(config, contract))
    if "moe" in config.model and COUNTED_WITH in contract["sensors"]:
        counted += f"\n{encoder_sizes(config.model, contract)}"
    return "\n\n".join([title, counted, contract_table(contract)])


def encoder_sizes(model: config_dict.ConfigDict, contract: Contract) -> str:
    """Parameters of an msGFM encoder with the embedding of hr, which is how papers count.

    Three encoders are counted: as the configuration says, dense, and with mixtures in all stages from its first mixture
    on.

    Args:
        model: config.model.
        contract: the input contract.

    Returns:
        The text.
    """
    stages, embed = tuple(model.moe.stages), msgfm.EMBED.format(COUNTED_WITH)
    all_later = tuple(
        stage for stage in range(min(stages, default=len(model.depths)), len(model.depths)) if model.depths[stage] > 1
    )
    lines = [f"encoder with {embed}, as its mixtures are placed (model.moe.stages; this configuration first)"]
    for placed in dict.fromkeys((stages, (), all_later)):
        other = model.copy_and_resolve_references()
        with other.unlocked():
            other.moe.stages = placed
        shapes = msgfm.param_shapes(other, contract)
        lines.append(f"  {str(placed) if placed else '() dense':<28}{_size((shapes['encoder'], shapes[embed])):>16,}")
    return "\n".join(lines)


def parameters(shapes: Mapping[str, Tree]) -> str:
    """Parameter counts as text: the first tree module by module, the other trees in all.

    The argument has four levels: tree -> family -> module -> leaves with a shape.
    """
    lines = ["parameters"]
    for number, (tree, families) in enumerate(shapes.items()):
        if number == 0:
            lines += [
                f"  {f'{family}/{name}':<28}{_size(leaves):>16,}"
                for family, modules in families.items()
                for name, leaves in modules.items()
            ]
        lines.append(f"  {f'all of {tree}':<28}{_size(families):>16,}")
    return "\n".join(lines)


def _size(tree: Tree) -> int:
    """Numbers in all leaves of a tree of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
