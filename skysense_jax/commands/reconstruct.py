"""`skysense-jax reconstruct`: what a trained msGFM makes of a place behind a mask, as a picture."""

from __future__ import annotations

import argparse
import pathlib

from skysense_jax import networks
from skysense_jax.core import exits
from skysense_jax.draw import places, reconstructions
from skysense_jax.models import systems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("path", help="workdir or checkpoint of an msGFM run")
    parser.add_argument("--data", required=True, help="dataset written by `data build`")
    parser.add_argument("--place", default="0", help="id of the place, or its number (train places first)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mask")
    parser.add_argument("--out", required=True, help="PNG to write")


def run(args: argparse.Namespace) -> int:
    """Draws the place and prints the file's name.

    Raises:
        ValueError: --out cannot be written, the network reconstructs nothing, or the dataset has no such place.
    """
    out = pathlib.Path(args.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: the picture is a PNG, give a name that ends in .png")
    if not out.resolve().parent.is_dir():
        raise ValueError(f"--out {out}: its folder does not exist")
    network = networks.open_network(args.path)
    description = network.description
    config, contract = description.config, description.contract
    if systems.system_of(description.model).reconstructions is None or config is None:
        raise ValueError(f"{args.path} is no run of msGFM: nothing else reconstructs images")
    record, meta = places.read_place(args.data, args.place)
    inputs = reconstructions.place_inputs(contract, record, meta)
    guesses = reconstructions.reconstructor(config, contract, args.seed)(network.encoder, inputs)
    reconstructions.draw(contract, guesses, record, meta, f"step {description.step}").save(out)
    print(out)
    return exits.DONE
