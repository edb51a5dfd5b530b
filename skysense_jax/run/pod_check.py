"""The training step through the real TPU compiler, for a described pod, without a TPU.

It lowers and compiles what `train` would run: the same plan, mesh, shardings and flags. The figures are what the
compiler says (memory, collectives, HBM traffic), and a roofline with its assumptions.

They always have fits, peak_hbm_bytes, hbm_limit_bytes, model_flops and compile_seconds. Where the compiler refuses
because of memory there is no program to read: collective_bytes, roofline_step_seconds and roofline_mfu are None, and
peak_hbm_bytes is the state with what the compiler says it needs beside it.

The roofline. Compute: all matrix products of the traced step, rematerialised ones included, at the chip's bfloat16
peak, spread evenly. HBM: bytes moved by every instruction of the compiled program. ICI and DCN: bytes sent per chip by
the collectives, at the links' full rate. The step takes the longest of the four: everything else is assumed to hide
behind it, which no real step attains. roofline_mfu = model FLOPs (core.flops) / chips / peak / that time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from ml_collections import config_dict

from skysense_jax import recipes
from skysense_jax.core import flops, sharding, trees
from skysense_jax.core import mesh as meshes
from skysense_jax.core.hardware import chips, hlo, xla_flags
from skysense_jax.run import checkpoint
from skysense_jax.run import plan as plans

EFFORT = "exec_time_optimization_effort"
"""The compiler's option for its optimisation effort."""


def describe(topology: str, slices: int) -> list[jax.Device]:
    """Devices of a TPU topology that is not present.

    Args:
        topology: "v5e:16x16", ...
        slices: how many slices of it.

    Returns:
        The described devices.

    Raises:
        ValueError: libtpu is missing, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: `launch/setup.sh tpu` installs libtpu (no TPU is needed)")
    more = {} if slices == 1 else {"num_slices": slices}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)
    except (RuntimeError, NotImplementedError) as error:  # libtpu's, for every reason
        raise ValueError(f"libtpu describes no topology {topology!r} x {slices}: {error}") from error


def prepare_environment(topology: str) -> list[str]:
    """Environment for a compiler without a TPU, to be set before libtpu is loaded; returns the compiler's flags.

    The flags are those that a pod of this generation gets, behind those that were set.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE=topology.split(":")[0] + "-1",
    )
    xla_flags.apply(os.environ, "tpu")
    return os.environ.get(xla_flags.VARIABLES["tpu"], "").split()


def with_every_chip_fed(cfg: config_dict.ConfigDict, devices: int) -> str:
    """Gives every device at least one place, encoded in no more microbatches than a device has places.

    Args:
        cfg: the whole configuration; config.data.batch is raised and config.objective.microbatches lowered in it.
        devices: of the pod.

    Returns:
        What was changed, for people; "" where nothing was.
    """
    notes, before, microbatches = [], cfg.data.batch, cfg.objective.get("microbatches", 1)
    if before < devices:
        cfg.data.batch = devices
        notes.append(f"config.data.batch={before} leaves devices without a place: compiled with {devices}")
    share = cfg.data.batch // devices
    if microbatches > share:
        cfg.objective.microbatches = share
        notes.append(
            f"config.objective.microbatches={microbatches} is more than the places of a device: compiled with {share}"
        )
    return "; ".join([*notes, "`train` needs the same values"]) if notes else ""


class _Device(NamedTuple):
    """What one device of the pod can do: its share of a chip."""

    flops_per_s: float
    hbm_bytes_per_s: float
    ici_bytes_per_s: float
    dcn_bytes_per_s: float
    hbm_limit: int


def _device(kind: str, per_chip: int) -> _Device:
    """The data sheet of a device; ValueError where there is none."""
    if kind not in chips.CHIPS:
        raise ValueError(f"no data sheet for {kind!r} in core/hardware/chips.py; there are {', '.join(chips.CHIPS)}")
    chip = chips.CHIPS[kind]
    return _Device(
        chip.flops / per_chip,
        chip.hbm_bytes_per_s / per_chip,
        chip.ici_bytes_per_s / per_chip,
        chips.DCN_BYTES_PER_S / per_chip,
        chip.hbm_limit // per_chip,
    )


def check(cfg: config_dict.ConfigDict, topology: str, slices: int, effort: float) -> dict[str, Any]:
    """Compiles the step of a configuration for a described pod.

    Args:
        cfg: the whole configuration; changed where the pod asks for it (:func:`with_every_chip_fed`).
        topology: "v5e:16x16", ...
        slices: how many slices of it.
        effort: the compiler's optimisation effort, -1 to 0.

    Returns:
        The figures (see the module's docstring), all per device unless the name says otherwise.

    Raises:
        ValueError: what the configuration, the mesh or the topology rule out.
        jax.errors.JaxRuntimeError: the compiler failed for another reason than memory.
    """
    recipes.check_config(cfg)
    compiler_flags = prepare_environment(topology)
    devices = describe(topology, slices)
    note = with_every_chip_fed(cfg, len(devices))
    cfg.data.statistics = "table"  # constants of the step: no dataset is needed to compile with other statistics
    mesh = meshes.make_mesh(cfg.mesh.to_dict(), devices)
    plan = plans.make_plan(cfg, plans.make_contract(cfg), mesh)
    kind, per_chip = devices[0].device_kind, chips.devices_per_chip(devices)
    device = _device(kind, per_chip)

    with jax.set_mesh(mesh):
        traced = plans.jit_step(plan, mesh).trace(plan.state, plan.batch)
    executed = flops.of_jaxpr(traced.jaxpr.jaxpr) / len(devices)
    begin = time.monotonic()
    compiled, refusal = None, ""
    try:
        compiled = traced.lower().compile({EFFORT: effort})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).splitlines()[0]
    seconds = time.monotonic() - begin

    result = {
        "config": cfg.model.name,
        "topology": topology,
        "slices": slices,
        "device": kind,
        "devices": len(devices),
        "devices_per_chip": per_chip,
        "mesh": dict(mesh.shape),
        "global_batch": int(cfg.data.batch),
        "note": note,
        "microbatches": int(cfg.objective.get("microbatches", 1)),
        "effort": effort,
        "compiler_flags": compiler_flags,
        "jax": jax.__version__,
        "hbm_limit_bytes": device.hbm_limit,
        "compile_seconds": seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(plan.state.params)),
        **{f"{name}_bytes": bytes_per_device(getattr(plan.state, name)) for name in checkpoint.TREES},
        "largest_replicated_bytes": largest_replicated(plan.state),
        "model_flops": plan.flops,
        "executed_flops": executed,
    }
    if compiled is None:
        temporaries = asked_for(refusal)
        state = sum(result[f"{name}_bytes"] for name in checkpoint.TREES)
        peak = None if temporaries is None else temporaries + state
        unknown = dict.fromkeys(("collective_bytes", "roofline_step_seconds", "roofline_mfu"))
        return {**result, "fits": False, "refusal": refusal, "peak_hbm_bytes": peak, **unknown}
    slice_of = [getattr(described, "slice_index", 0) for described in mesh.devices.flat]
    return result | _figures(compiled, slice_of, device, executed, plan.flops / len(devices))


def _figures(
    compiled: jax.stages.Compiled, slice_of: list[int], device: _Device, executed: float, model_flops: float
) -> dict[str, Any]:
    """What the compiled program needs and moves per device, and its roofline; FLOPs are per device too."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None, "the TPU compiler tells both"
    program = hlo.read(text)
    traffic = hlo.collectives(program, slice_of)
    ici = sum(kind.wire - kind.between_slices for kind in traffic.values())
    dcn = sum(kind.between_slices for kind in traffic.values())
    hbm = hlo.hbm_bytes(program)
    peak = memory.peak_memory_in_bytes  # with the arguments; temp_size_in_bytes ignores what shares memory
    times = {
        "compute": executed / device.flops_per_s,
        "hbm": hbm / device.hbm_bytes_per_s,
        "ici": ici / device.ici_bytes_per_s,
        "dcn": dcn / device.dcn_bytes_per_s,
    }
    step = max(times.values())
    return {
        "fits": peak <= device.hbm_limit,
        "peak_hbm_bytes": peak,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": peak - memory.argument_size_in_bytes,
        "hbm_traffic_bytes": hbm,
        "collective_bytes": ici + dcn,
        "ici_bytes": ici,
        "dcn_bytes": dcn,
        "collectives": {name: dataclasses.asdict(kind) for name, kind in traffic.items()},
        "roofline_seconds": times,
        "roofline_step_seconds": step,
        "roofline_mfu": model_flops / device.flops_per_s / step,
    }


def asked_for(refusal: str) -> int | None:
    """Bytes that the compiler's refusal asks for: the first size in it, "(10.51T)"; the limit follows. None without."""
    size = re.search(r"\(([\d.]+)([KMGT])\)", refusal)
    return int(float(size.group(1)) * 2 ** (10 * (1 + "KMGT".index(size.group(2))))) if size else None


def bytes_per_device(tree: trees.Tree) -> int:
    """Bytes that one device holds of a tree of shapes with shardings."""
    return sharding.report(tree, jax.tree.map(lambda leaf: leaf.sharding, tree)).per_device


def largest_replicated(tree: trees.Tree) -> int:
    """Bytes of the largest leaf that every device holds whole."""
    whole = [trees.size_bytes(leaf) for leaf in jax.tree.leaves(tree) if leaf.sharding.is_fully_replicated]
    return max(whole, default=0)
