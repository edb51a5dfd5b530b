"""Exported folders: how `networks` recognises, describes and reads what `torch_export.export` wrote."""

from __future__ import annotations

import json
import pathlib

from skysense_jax.convert import torch_export, torch_import
from skysense_jax.core import config, paths
from skysense_jax.core.trees import Tree
from skysense_jax.models.description import Description, Reader

DESCRIPTION = "config.json"


def recognise(folder: pathlib.Path) -> bool:
    """Whether a folder holds exported weights."""
    return (folder / DESCRIPTION).is_file() and bool(torch_export.weight_files(folder))


def describe(folder: pathlib.Path) -> Description:
    """The description of an exported folder.

    Args:
        folder: a folder that `recognise` says yes to.

    Returns:
        Its description, of kind "export".

    Raises:
        ValueError: as :func:`read_description`; the folder is in a bucket.
    """
    refuse_bucket(folder)
    return read_description("export", folder, DESCRIPTION)


def refuse_bucket(folder: pathlib.Path) -> None:
    """Raises ValueError for a folder in a bucket: networks are opened from a disk (`--init_from` reads buckets too)."""
    if paths.is_remote(folder):
        raise ValueError(f"{folder}: exported and imported weights are read from a disk; copy the folder here first")


def read_description(kind: str, folder: pathlib.Path, name: str) -> Description:
    """Reads a description from a JSON file with architecture, input_contract and provenance.

    Args:
        kind: `Reader.kind` of the folder.
        folder: where it is.
        name: the file in it.

    Returns:
        The description of the folder.

    Raises:
        ValueError: the file lacks a part.
    """
    meta = json.loads((folder / name).read_text())
    if "architecture" not in meta or "input_contract" not in meta:
        raise ValueError(
            f"{folder}/{name} has no architecture and input_contract; "
            "it was not written by export-torch or import-torch"
        )
    provenance = dict(meta.get("provenance", {}))
    run_config = provenance.pop("config", None)
    return Description(
        kind,
        folder,
        None if run_config is None else config.from_json(run_config),
        config.from_json(meta["architecture"]),
        meta["input_contract"],
        provenance.get("step"),
        provenance,
    )


def weights(description: Description) -> Tree:
    """Reads the parameters of an exported folder's network.

    Args:
        description: of the folder.

    Returns:
        The parameter tree, numpy float32.

    Raises:
        ValueError: a tensor does not fit the model; it is named.
    """
    return torch_import.load_folder(description.path)[0]


READER = Reader(
    "export",
    f"an exported folder has {DESCRIPTION} and {torch_export.WEIGHTS} or {torch_export.INDEX}",
    recognise,
    describe,
    weights,
)
