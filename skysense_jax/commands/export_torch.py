"""`skysense-jax export-torch`: the network of a run, or imported weights, as a folder that PyTorch reads.

Of a SkySense run it is the teacher. Where the weights come from is written into the folder.
"""

from __future__ import annotations

import argparse
from typing import Any

from skysense_jax import __version__, networks
from skysense_jax.convert import layouts, torch_export, verify
from skysense_jax.convert.tensor_files import torch_is_there
from skysense_jax.core import exits
from skysense_jax.run.folder import as_json, commit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("path", help="workdir (its newest checkpoint), checkpoint or imported weights")
    parser.add_argument("--out", required=True, help="folder to write; must not hold exported weights yet")
    parser.add_argument(
        "--bank",
        default=networks.OWN_BANK,
        help="prototype bank of a network with geo-context: own, none (without it), or another network's folder",
    )
    parser.add_argument(
        "--per-module", action="store_true", help="SkySense: one file of weights per module, with an index"
    )


def run(args: argparse.Namespace) -> int:
    """Exports and prints the folder.

    Raises:
        ValueError: the network is exported already; as `networks.open_network` and `torch_export.export`.
    """
    description = networks.read_description(args.path)
    if description.kind == "export":
        raise ValueError(f"{args.path} is exported already")
    network = networks.open_network(args.path, args.bank)
    provenance = _provenance(description)
    if args.bank not in (networks.OWN_BANK, networks.NO_BANK):
        other = networks.read_description(args.bank)
        provenance["bank"] = {"from": other.kind, "step": other.step}
    model = network.description.model
    out = torch_export.export(network.encoder, description.contract, model, args.out, provenance, args.per_module)
    del network  # a full-size model in plain torch needs the room
    if torch_is_there():
        worst = torch_export.record_parity(out, verify.in_torch(out))
        print(f"plain torch reproduces the frozen batch to {worst:.1e} (relative L2)")
    else:
        print("torch is not installed: `skysense-jax verify` will check the folder where it is")
    print(out)
    return exits.DONE


def _provenance(description: networks.Description) -> dict[str, Any]:
    """Where the weights come from, for the exported folder."""
    exported: dict[str, Any] = {"commit": commit(), "exported_with": __version__}
    if description.kind == "imported" or description.config is None:
        return description.provenance | exported
    return exported | {
        "source": layouts.LAYOUTS[description.model.name].source,
        "step": description.step,
        "dataset_id": description.provenance["dataset id"],
        "trained_with": description.provenance["code"],
        "config": as_json(description.config),
    }
