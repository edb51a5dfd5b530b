"""What a folder with a network says about it, and what a reader of one kind of folder gives."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import config_dict

from skysense_jax.core.trees import Tree


class Description(NamedTuple):
    """A network without its weights.

    Attributes:
        kind: name of the kind of folder, `Reader.kind`.
        path: the folder.
        config: the run's whole configuration; None where only the model's is known (weights trained elsewhere).
        model: config.model.
        contract: the input contract.
        step: of the checkpoint; None where the folder does not say.
        provenance: facts to print, in order.
    """

    kind: str
    path: pathlib.Path
    config: config_dict.ConfigDict | None
    model: config_dict.ConfigDict
    contract: dict[str, Any]
    step: int | None
    provenance: dict[str, Any]


class Reader(NamedTuple):
    """How one kind of folder is opened.

    Attributes:
        kind: its name.
        mark: what tells it from other folders, for people.
        recognise: folder -> whether it is one of this kind; no file is read.
        describe: folder -> Description; no weights are read. Raises ValueError for a folder that does not fit.
        weights: Description -> parameters of the network, its prototype bank among them where it has one.
    """

    kind: str
    mark: str
    recognise: Callable[[pathlib.Path], bool]
    describe: Callable[[pathlib.Path], Description]
    weights: Callable[[Description], Tree]
