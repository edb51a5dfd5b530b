"""The model card of an exported folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple


class SystemCard(NamedTuple):
    """The parts of a model card that depend on the system.

    Attributes:
        title: title and introduction, lines.
        grid: what an image covers, a sentence.
        call: the arguments of the call, code.
        shapes: of the arguments, a comment.
        result: what to take from the outputs, code.
        size: a sentence on sizes.
    """

    title: list[str]
    grid: str
    call: str
    shapes: str
    result: str
    size: str


def model_card(config: Mapping[str, Any], system: SystemCard) -> str:
    """Writes the README.md of an exported folder: what it is, what it eats, how to load it, where it comes from.

    Args:
        config: the content of its config.json.
        system: what depends on the kind of network.

    Returns:
        The text.
    """
    contract, provenance, code = config["input_contract"], config["provenance"], f"modeling_{config['model_type']}"
    rows = [
        f"| {name} | {', '.join(rule['bands'])} | {rule['unit']} | {rule['gsd']} m |"
        for name, rule in contract["sensors"].items()
    ]
    counts = [f"| {name} | {count:,} |" for name, count in config["parameters"].items()]
    origin = [f"- {key}: {json.dumps(value)}" for key, value in provenance.items()] or ["- not recorded"]
    figures = config["parity"].get("torch_rel_l2")
    measured = "nothing, without torch"
    if figures:
        measured = f"plain torch within {max(figures.values()):.1e} of JAX (relative L2)"
    return "\n".join(
        [
            *system.title,
            "",
            "## Input",
            "",
            "| sensor | bands, in this order | unit | pixel |",
            "|---|---|---|---|",
            *rows,
            "",
            f"{system.grid} Give raw units: the model normalises, with the statistics in `config.json`. "
            "Invalid pixels and unmeasured bands are declared by masks.",
            "",
            "## Use (PyTorch, this folder only)",
            "",
            "```python",
            f"from {code} import load",
            "",
            "model = load('.')",
            f"outputs = model({{{system.call}}})",
            f"# {system.shapes}",
            system.result,
            "```",
            "",
            f"`python {code}.py` runs the frozen batch in `parity.safetensors` and prints the differences.",
            f"Measured at export: {measured}. `sha256sum -c SHA256SUMS` checks the bytes of the files.",
            "",
            "## Size",
            "",
            "| part | parameters |",
            "|---|---|",
            *counts,
            "",
            system.size,
            "",
            "## Provenance",
            "",
            *origin,
            "",
        ]
    )


def skysense_card(config: Mapping[str, Any]) -> SystemCard:
    """Fills in the card of a SkySense network from the content of its config.json."""
    architecture, contract = config["architecture"], config["input_contract"]
    outputs = "outputs['maps'], outputs.get('hr_stages')"
    if "fusion" in config["parameters"]:
        outputs = f"outputs['fused'], {outputs}"
    where = ", 'place': {'lon': degrees, 'lat': degrees}" if "geo" in config["parameters"] else ""
    return SystemCard(
        [
            "# SkySense weights exported by skysense_jax",
            "",
            "Encoders per sensor on one grid, a fusion transformer per cell. "
            "Parameter names are the SkySense release's.",
        ],
        f"One base cell is one Sentinel-2 pixel; {contract['ratio']} HR pixels lie along it.",
        f"'{next(iter(contract['sensors']))}': {{'image': image, 'dates': day_of_year}}{where}",
        "image: [B,T,C,H,W] in raw units, dates: [B,T]",
        outputs,
        f"Width of the common grid {architecture['width']}, calendar `{architecture['calendar']}`.",
    )


def msgfm_card(config: Mapping[str, Any]) -> SystemCard:
    """Fills in the card of an msGFM network from the content of its config.json."""
    architecture, contract = config["architecture"], config["input_contract"]
    moe = architecture["moe"]
    experts = f"{moe['experts']} experts in the odd blocks of stages {moe['stages']}" if moe["stages"] else "no experts"
    return SystemCard(
        [
            "# msGFM weights exported by skysense_jax",
            "",
            "One Swin encoder for all sensors, each with its own patch embedding and decoder to pixels. "
            "Parameter names are SimMIM's, and Swin-MoE's for the experts.",
        ],
        f"Every acquisition is encoded alone, at {architecture['img_size']} x {architecture['img_size']} pixels; "
        "others are resized.",
        f"'{next(iter(contract['sensors']))}': {{'image': image}}",
        "image: [B,T,C,H,W] in raw units",
        "outputs['maps'], outputs['stages'], outputs['pixels']",
        f"Swin with {tuple(architecture['depths'])} blocks, window {architecture['window']}, {experts}.",
    )
