"""Devices and processes: start the processes of a job together, and lay its devices out as a mesh.

Mesh axes: ``data`` (replicas, the slow network between slices or hosts) and ``fsdp`` (parameters and batch split, the
fast network); ``expert`` splits the experts of a mixture. The batch is split over all axes together.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils

from skysense_jax.core import exits, rendezvous

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the leading axis of a batch is split."""


CLUSTER_COUNTS = (
    # variable, the launcher that sets it; a list of hosts counts by its commas
    ("SLURM_STEP_NUM_TASKS", "srun"),
    ("SLURM_NTASKS", "Slurm"),
    ("OMPI_COMM_WORLD_SIZE", "Open MPI"),
    ("PMI_SIZE", "MPICH"),
    ("WORLD_SIZE", "torchrun"),
    ("TPU_WORKER_HOSTNAMES", "TPU pod"),
    ("MEGASCALE_NUM_SLICES", "TPU multislice"),
)
"""Where a launcher says how many processes the job has; the first that is set counts."""


def start_processes() -> tuple[int, int]:
    """Starts ``jax.distributed`` where the job has several processes.

    SKYSENSE_PROCESSES says how many; 1 or unset means a single process. With SKYSENSE_COORDINATOR (host:port of process
    0) and SKYSENSE_PROCESS_INDEX the processes count themselves first (core.rendezvous). Without them jax's own cluster
    detection is used (TPU, Slurm, GKE). SKYSENSE_START_TIMEOUT_S (300) says how many seconds to wait for all.

    It must not happen that N processes each train alone. Where jax's detection waits in vain, in C++, the message is
    printed and the process exits with 78.

    Returns:
        (process index, process count).

    Raises:
        ValueError: with both counts, unless exactly SKYSENSE_PROCESSES came together, or where it is unset and the
            launcher says that there are several; or one of the variables cannot be read.
    """
    processes, timeout_s = _number("SKYSENSE_PROCESSES", 0), _number("SKYSENSE_START_TIMEOUT_S", 300)
    counts = [(name, launcher, os.environ[name]) for name, launcher in CLUSTER_COUNTS if os.environ.get(name)]
    if not processes and counts:
        name, launcher, value = counts[0]
        count = int(value) if value.isdigit() else len(value.split(","))
        if count > 1:
            raise ValueError(
                f"{name}={value}: {launcher} started {count} processes, SKYSENSE_PROCESSES is not set, so "
                f"each would train alone; set SKYSENSE_PROCESSES={count}, or 1 where that is meant"
            )
    processes = max(processes, 1)
    if processes > 1:
        coordinator, index = os.environ.get("SKYSENSE_COORDINATOR"), _number("SKYSENSE_PROCESS_INDEX", -1)
        if (coordinator is None) != (index < 0):
            raise ValueError("SKYSENSE_COORDINATOR and SKYSENSE_PROCESS_INDEX go together: set both or neither")
        if coordinator is not None:
            rendezvous.meet(coordinator, processes, index, timeout_s)
        guard = threading.Timer(timeout_s, _give_up, (processes, timeout_s))
        guard.daemon = True
        guard.start()
        patience_s = timeout_s + 60  # when it is over, jax aborts the process without a message of this package
        if coordinator is not None:
            jax.distributed.initialize(coordinator, processes, index, initialization_timeout=patience_s)
        else:
            jax.distributed.initialize(initialization_timeout=patience_s)
        guard.cancel()
    if jax.process_count() != processes:
        raise ValueError(
            f"{jax.process_count()} processes came together, {processes} are expected (SKYSENSE_PROCESSES)"
        )
    return jax.process_index(), processes


def _number(name: str, default: int) -> int:
    """A count from the environment."""
    text = os.environ.get(name) or str(default)
    if not text.removeprefix("-").isdigit():
        raise ValueError(f"{name}={text!r}: a whole number is needed")
    return int(text)


def _give_up(processes: int, timeout_s: int) -> None:
    """Ends a process that waits for the other processes inside jax."""
    sys.stderr.write(
        f"{processes} processes are expected (SKYSENSE_PROCESSES), fewer came together within {timeout_s} "
        "s (SKYSENSE_START_TIMEOUT_S); with SKYSENSE_COORDINATOR and SKYSENSE_PROCESS_INDEX the missing "
        "ones are named\n"
    )
    sys.stderr.flush()
    os._exit(exits.BAD_INPUT)


def mesh_shape(axes: Mapping[str, int], n_devices: int) -> dict[str, int]:
    """Sizes of the mesh axes for a number of devices.

    Args:
        axes: name of an axis -> its size; at most one size is -1: what remains of `n_devices`.
        n_devices: devices of the job.

    Returns:
        Name of an axis -> its size, in the same order.

    Raises:
        ValueError: a size is not positive, or the product of the sizes is not `n_devices`.
    """
    sizes = {name: int(size) for name, size in axes.items()}
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {sizes}: sizes are positive, at most one is -1 (all remaining devices)")
    known = int(np.prod([size for size in sizes.values() if size != -1], dtype=np.int64))
    if open_axes:
        sizes[open_axes[0]] = n_devices // known
    if int(np.prod(list(sizes.values()), dtype=np.int64)) != n_devices:
        raise ValueError(
            f"config.mesh {dict(axes)} does not use exactly the {n_devices} devices of the job: the "
            "product of the sizes must be their number (-1: what remains)"
        )
    return sizes


def make_mesh(axes: Mapping[str, int], devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh of a job, every axis of type Auto (GSPMD).

    On TPU the order of devices follows the torus; where an axis is smaller than a physical axis, the physical axis is
    split. Several slices are laid out along the axis `data`, the only axis whose collectives may cross the slow
    network.

    Args:
        axes: name of an axis -> its size (:func:`mesh_shape`), in the order of the mesh.
        devices: to lay out; None: all devices of the job.

    Returns:
        The mesh.

    Raises:
        ValueError: as :func:`mesh_shape`, or the size of `data` is not a multiple of the number of slices.
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
        within = tuple(size // n for size, n in zip(shape, between, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def batch_axes(mesh: jax.sharding.Mesh | None = None) -> dict[str, int]:
    """Axes that a batch is split over, with their sizes, of `mesh` or the mesh in use; none without `jax.set_mesh`."""
    shape = jax.sharding.get_abstract_mesh().shape if mesh is None else mesh.shape
    return {axis: size for axis, size in shape.items() if axis in BATCH_AXES}


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """Leading axis split over all batch axes of the mesh."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(tuple(batch_axes(mesh))))


def replicated(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    """The whole value on every device."""
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
