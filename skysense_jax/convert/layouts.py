"""The table of torch layouts: how a system's weights look as a folder that PyTorch reads.

Its keys are those of `models.systems.SYSTEMS` (a test).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from skysense_jax.convert import frozen, keymap, model_card
from skysense_jax.models import msgfm
from skysense_jax.models.inputs import PLACE
from skysense_jax.models.skysense import Params
from skysense_jax.sensors import Contract


class Layout(NamedTuple):
    """One system in torch. `model` below is config.model.

    Attributes:
        classes: what the names of its classes begin with in the modelling file, modeling_<model.name>.py.
        in_parts: whether it was released as one file per module, and so may be exported that way.
        source: where the weights of an exported run come from, for its provenance.
        entries: (model, contract) -> the tensors of a whole-model file.
        inputs: (params, model, contract) -> the inputs of the frozen batch.
        outputs: (params, model, contract, inputs) -> its outputs, flat, in torch's layout.
        card: (config.json) -> the parts of the model card that depend on the system.
    """

    classes: str
    in_parts: bool
    source: str
    entries: Callable[[config_dict.ConfigDict, Contract], list[keymap.Entry]]
    inputs: Callable[[Params, config_dict.ConfigDict, Contract], frozen.Inputs]
    outputs: Callable[..., dict[str, np.ndarray]]
    card: Callable[[Mapping[str, Any]], model_card.SystemCard]


def _skysense_inputs(params: Params, model: config_dict.ConfigDict, contract: Contract) -> frozen.Inputs:
    inputs = frozen.skysense_inputs(model, contract)
    if "geo" in params:
        inputs[PLACE] = frozen.frozen_place(params["geo"]["bank"])
    return inputs


LAYOUTS: dict[str, Layout] = {
    "skysense": Layout(
        classes="SkySense",
        in_parts=True,
        source="teacher of a skysense_jax run",
        entries=keymap.skysense_entries,
        inputs=_skysense_inputs,
        outputs=frozen.skysense_outputs,
        card=model_card.skysense_card,
    ),
    "msgfm": Layout(
        classes="MsGFM",
        in_parts=False,
        source="msGFM of a skysense_jax run",
        entries=lambda model, contract: keymap.msgfm_entries(model, msgfm.module_names(model, contract)),
        inputs=lambda params, model, contract: frozen.msgfm_inputs(model, contract),
        outputs=frozen.msgfm_outputs,
        card=model_card.msgfm_card,
    ),
}
"""config.model.name -> its layout."""


def model_entries(model: config_dict.ConfigDict, contract: Contract) -> list[keymap.Entry]:
    """Lists all tensors of a model, in the names of a whole-model file.

    Args:
        model: config.model.
        contract: the input contract.

    Returns:
        The entries of its tensors.
    """
    return LAYOUTS[model.name].entries(model, contract)


def frozen_outputs(
    params: Params, model: config_dict.ConfigDict, contract: Contract, inputs: frozen.Inputs
) -> dict[str, np.ndarray]:
    """Runs a model on a frozen batch in float32 at full matmul precision.

    Args:
        params: of the model.
        model: config.model.
        contract: the input contract.
        inputs: of the frozen batch.

    Returns:
        The outputs, flat, in torch's layout (`frozen.skysense_outputs`, `frozen.msgfm_outputs`).
    """
    float32 = config_dict.ConfigDict({**model.to_dict(), "dtype": "float32"})
    with jax.default_matmul_precision("highest"):
        outputs = LAYOUTS[model.name].outputs(params, float32, contract, inputs)
        return {key: np.ascontiguousarray(value) for key, value in outputs.items()}


def frozen_batch(
    params: Params, model: config_dict.ConfigDict, contract: Contract
) -> tuple[frozen.Inputs, dict[str, np.ndarray]]:
    """Makes the batch to be frozen beside a model's weights.

    Args:
        params: of the model.
        model: config.model.
        contract: the input contract.

    Returns:
        (inputs, outputs).
    """
    inputs = LAYOUTS[model.name].inputs(params, model, contract)
    return inputs, frozen_outputs(params, model, contract, inputs)
