"""Tables of names (see skysense_jax.convert.keymap) of torch modules that only the reference cases hold."""

from __future__ import annotations

from typing import Any

from skysense_jax.convert.keymap import Entry, msgfm_entries, one_sensor
from skysense_jax.models import msgfm


def dino_head_entries(layers: int, gain: bool) -> list[Entry]:
    """DINOHead in facebookresearch/dino's names.

    Args:
        layers: linear layers of the MLP.
        gain: the module has the last layer's gain (weight_g) as a parameter.

    Returns:
        One entry per tensor.
    """
    entries = []
    for i in range(max(layers, 1)):
        torch = f"mlp.{2 * i}" if layers > 1 else "mlp"
        entries.append(Entry(f"{torch}.weight", f"mlp{i}/kernel", None, "linear"))
        entries.append(Entry(f"{torch}.bias", f"mlp{i}/bias"))
    entries.append(Entry("last_layer.weight_v", "last_layer_v", None, "linear"))
    return entries + ([Entry("last_layer.weight_g", "last_layer_g", None, "column")] if gain else [])


def simmim_entries(cfg: Any, sensor: str) -> list[Entry]:
    """The part of a msGFM model that a SimMIM or GFM checkpoint holds, in the checkpoint's names.

    Args:
        cfg: config.model.
        sensor: whose patch embedding and decoder the checkpoint has.

    Returns:
        One entry per tensor of the encoder, the mask token, the patch embedding and the decoder.
    """
    modules = (msgfm.ENCODER, msgfm.MASK_TOKEN, msgfm.EMBED.format(sensor), msgfm.DECODER.format(sensor))
    return [entry._replace(torch=one_sensor(entry.torch, sensor)) for entry in msgfm_entries(cfg, modules)]
