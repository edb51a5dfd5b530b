"""Exported folders: how `networks` recognises, describes and reads what `torch_export.export` wrote."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from skysense_jax.convert import torch_export, torch_import
from skysense_jax.core import config, paths
from skysense_jax.models.description import Description, Reader

DESCRIPTION = "config.json"


def recognise(folder: pathlib.Path) -> bool:
    """Whether a folder holds exported weights."""
    return (folder / DESCRIPTION).is_file() and bool(torch_export.weight_files(folder))


def describe(folder: pathlib.Path) -> Description:
    """The description of an exported folder. Errors as :func:`read_description`."""
    return read_description("export", folder, DESCRIPTION)


def read_description(kind: str, folder: pathlib.Path, name: str) -> Description:
    """A description from a JSON file with architecture, input_contract and provenance.

    Args:
        kind: `Reader.kind` of the folder.
        folder: a local folder.
        name: the file in it.

    Raises:
        ValueError: the folder is in a bucket, or the file lacks a part.
    """
    if paths.is_remote(folder):
        raise ValueError(f"{folder}: exported and imported weights are read from a disk; copy the folder here first")
    meta = json.loads((folder / name).read_text())
    if "architecture" not in meta or "input_contract" not in meta:
        raise ValueError(
            f"{folder}/{name} has no architecture and input_contract; it was not written by export-torch or import-torch"
        )
    provenance = dict(meta.get("provenance", {}))
    whole = provenance.pop("config", None)
    return Description(
        kind,
        folder,
        None if whole is None else config.from_json(whole),
        config.from_json(meta["architecture"]),
        meta["input_contract"],
        provenance.get("step"),
        provenance,
    )


def weights(description: Description) -> Any:
    """The parameters of an exported folder's network. Raises ValueError naming what does not fit."""
    return torch_import.load_folder(description.path)[0]


READER = Reader(
    "export",
    f"an exported folder has {DESCRIPTION} and {torch_export.WEIGHTS} or {torch_export.INDEX}",
    recognise,
    describe,
    weights,
)
