"""Devices and processes: start the processes of a job together, and lay its devices out as a mesh.

Mesh axes: ``data`` (replicas, the slow network between slices or hosts) and ``fsdp`` (parameters and batch split, the
fast network); a model with experts adds ``expert``. The batch is split over ``data`` and ``fsdp`` together.
"""
from __future__ import annotations

import os
from typing import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils

BATCH_AXES = ("data", "fsdp")
"""Mesh axes over which the leading axis of a batch is split."""


def start_processes(
    processes: int | None = None, coordinator: str | None = None, process_index: int | None = None, timeout_s: int = 300
) -> tuple[int, int]:
    """Start ``jax.distributed`` where the job has several processes; returns (process index, process count).

    Arguments default to SKYSENSE_PROCESSES, SKYSENSE_COORDINATOR (host:port) and SKYSENSE_PROCESS_INDEX. processes = 1
    or unset: a single process, nothing is started. Without a coordinator jax's own cluster detection is used (TPU,
    Slurm, GKE). Raises ValueError with both counts unless exactly `processes` processes came together: N processes that
    each train alone must not happen.
    """
    env = os.environ
    processes = int(env.get("SKYSENSE_PROCESSES", "1")) if processes is None else processes
    if processes == 1:
        return 0, 1
    coordinator = env.get("SKYSENSE_COORDINATOR") if coordinator is None else coordinator
    if process_index is None and "SKYSENSE_PROCESS_INDEX" in env:
        process_index = int(env["SKYSENSE_PROCESS_INDEX"])
    if coordinator is not None:
        jax.distributed.initialize(coordinator, processes, process_index, initialization_timeout=timeout_s)
    else:
        jax.distributed.initialize(initialization_timeout=timeout_s)
    if jax.process_count() != processes:
        raise ValueError(f"{jax.process_count()} processes came together, "
                         f"{processes} are expected (SKYSENSE_PROCESSES)")
    return jax.process_index(), jax.process_count()


def mesh_shape(axes: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes with one -1 replaced by what remains of `n_devices`; raises ValueError unless the product
    fits.
    """
    sizes = {name: int(size) for name, size in axes.items()}
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {sizes}: sizes are positive, at most one is -1 (all remaining devices)")
    known = int(np.prod([size for size in sizes.values() if size != -1], dtype=np.int64))
    if open_axes:
        sizes[open_axes[0]] = n_devices // known
    if int(np.prod(list(sizes.values()), dtype=np.int64)) != n_devices:
        raise ValueError(f"mesh {dict(axes)} does not use exactly the {n_devices} devices of the job")
    return sizes


def make_mesh(axes: Mapping[str, int], devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Mesh over all devices (or `devices`), axes in the order given, every axis of type Auto (GSPMD).

    On TPU the order of devices follows the torus; where an axis is smaller than a physical one, the physical one is
    split. Several slices are laid out along the axis `data`, the only one whose collectives may cross the slow network:
    ValueError where its size is not a multiple of theirs.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = mesh_shape(axes, len(devices))
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", None) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        if sizes.get("data", 1) % slices:
            raise ValueError(f"mesh {sizes}: {slices} slices need config.mesh.data to be a multiple of {slices}")
        between = tuple(slices if name == "data" else 1 for name in sizes)
        within = tuple(size // n for size, n in zip(shape, between))
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Leading axis split over all batch axes of the mesh."""
    axes = tuple(name for name in mesh.axis_names if name in BATCH_AXES)
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The whole value on every device."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
