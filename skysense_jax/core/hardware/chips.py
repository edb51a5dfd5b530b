"""What the accelerators can do, from their vendors' data sheets: the denominators of MFU and of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import jax

GIB = 2**30
"""Bytes of a gibibyte."""


class Chip(NamedTuple):
    """One chip, which may be two jax devices (:func:`devices_per_chip`).

    Attributes:
        flops: dense bfloat16 operations per second.
        hbm_bytes_per_s: bandwidth of the memory; 0: not needed here.
        ici_bytes_per_s: bandwidth of the links to other chips of a slice, all links, one direction; 0: not needed here.
        hbm_limit: bytes that a program may use, as the TPU compiler states it in its out-of-memory error: less than is
            built in, because the runtime keeps some; 0: not needed here.
    """

    flops: float
    hbm_bytes_per_s: float = 0.0
    ici_bytes_per_s: float = 0.0
    hbm_limit: int = 0


_V4 = Chip(275e12, 1.2288e12, 150e9, int(30.5 * GIB))
_V5E = Chip(197e12, 0.819e12, 100e9, int(15.75 * GIB))
_V5P = Chip(459e12, 2.765e12, 300e9, int(95.74 * GIB))
_V6E = Chip(918e12, 1.638e12, 200e9, int(31.25 * GIB))
_V7X = Chip(2307e12, 7.38e12, 600e9, int(189.5 * GIB))

CHIPS = {
    # By jax's device_kind. TPU: cloud.google.com/tpu/docs, page of each version: peak, HBM bandwidth, interchip
    # interconnect (given for both directions: halved here).
    "TPU v4": _V4,
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V7X,
    "NVIDIA A100-SXM4-40GB": Chip(312e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12),
    "NVIDIA H200": Chip(989e12),
}

DCN_BYTES_PER_S = 3.125e9
"""Between slices, per chip, one direction: 200 Gbit/s of a host's network card over 8 chips (cloud.google.com/tpu/docs,
v5e and v6e host machines). An assumption where hosts are others."""


def devices_per_chip(devices: Sequence[jax.Device]) -> int:
    """How many of these jax devices share a chip: 2 on tpu7x, and 2 on a v4 that is described and not present."""
    places = [
        (getattr(device, "slice_index", None), tuple(device.coords)) for device in devices if hasattr(device, "coords")
    ]
    return len(places) // len(set(places)) if places else 1
