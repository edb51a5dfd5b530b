"""`skysense-jax compile-check`: the training step through the real TPU compiler, for a described pod, without a TPU.

    skysense-jax compile-check --config FILE --topology v5e:16x16 [--slices 2] [--json FILE] [--config.field=value ...]

Needs libtpu (`launch/setup.sh tpu`), not a TPU. It lowers and compiles what `train` would run: the same plan, mesh,
shardings and flags. What it prints is what the compiler says (memory, collectives, HBM traffic), and a roofline with
its assumptions; nothing here has run on a TPU. Exit code 0: it fits; 1: it does not; 78: bad input; 70: the compiler
failed.

The JSON always has fits, peak_hbm_bytes, hbm_limit_bytes, model_flops and compile_seconds. Where the compiler refuses
because of memory there is no program to read: collective_bytes, roofline_step_seconds and roofline_mfu are null, and
peak_hbm_bytes is the state with what the compiler says it needs beside it.

The roofline. Compute: all matrix products of the traced step, rematerialised ones included, at the chip's bfloat16
peak, spread evenly. HBM: bytes moved by every instruction of the compiled program. ICI and DCN: bytes sent per chip by
the collectives, at the links' full rate. The step takes the longest of the three: everything else is assumed to hide
behind it, which no real step attains. roofline_mfu = model FLOPs (core.flops) / chips / peak / that time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from jax.experimental import topologies
from ml_collections import config_dict

from skysense_jax import recipes
from skysense_jax.core import chips, config, exits, flops, hlo, sharding, trees, xla_flags
from skysense_jax.core import mesh as meshes
from skysense_jax.core.chips import GIB
from skysense_jax.core.files import write_atomically
from skysense_jax.run import checkpoint
from skysense_jax.run import plan as plans

EFFORT = "exec_time_optimization_effort"


def define_flags(values: flags.FlagValues) -> None:
    """The flags beside --config."""
    flags.DEFINE_string(
        "topology", None, "TPU generation and shape: v5e:16x16, v5p:8x8x16, v6e:16x16, ...", flag_values=values
    )
    flags.DEFINE_integer(
        "slices", 1, "slices of this topology, joined by the data-centre network", flag_values=values, lower_bound=1
    )
    flags.DEFINE_float(
        "effort",
        -1.0,
        "the compiler's optimisation effort, -1 (minutes) to 0 (its default; an hour at full size)",
        flag_values=values,
        lower_bound=-1.0,
        upper_bound=1.0,
    )
    flags.DEFINE_string("json", None, "also write the figures to this file", flag_values=values)


def describe(topology: str, slices: int) -> list[Any]:
    """Devices of a TPU topology that is not there. Raises ValueError where libtpu is missing or knows no such one."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError("the TPU compiler is not installed: `launch/setup.sh tpu` installs libtpu (no TPU is needed)")
    more = {} if slices == 1 else {"num_slices": slices}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices)
    except (RuntimeError, NotImplementedError) as error:  # libtpu's, for every reason
        raise ValueError(f"libtpu describes no topology {topology!r} x {slices}: {error}") from error


def prepare_environment(topology: str) -> list[str]:
    """Environment for a compiler without a TPU, before libtpu is loaded; returns the compiler's flags: those a pod of
    this generation gets, behind those that were set.
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
    """At least one place per device, encoded in no more parts than a device has places: raises config.data.batch and
    lowers config.objective.microbatches to that, and says so ('' where nothing is changed).
    """
    notes, before, parts = [], cfg.data.batch, cfg.objective.get("microbatches", 1)
    if before < devices:
        cfg.data.batch = devices
        notes.append(f"config.data.batch={before} leaves devices without a place: compiled with {devices}")
    share = cfg.data.batch // devices
    if parts > share:
        cfg.objective.microbatches = share
        notes.append(
            f"config.objective.microbatches={parts} is more than the places of a device: compiled with {share}"
        )
    return "; ".join([*notes, "`train` needs the same values"]) if notes else ""


def check(cfg: config_dict.ConfigDict, topology: str, slices: int, effort: float) -> dict[str, Any]:
    """Compiles the step of `cfg` for the topology and returns the figures (see the module's docstring), all per device
    unless the name says otherwise. Raises ValueError for what the configuration, the mesh or the topology rule out.
    """
    recipes.check_config(cfg)
    compiler_flags = prepare_environment(topology)
    devices = describe(topology, slices)
    note = with_every_chip_fed(cfg, len(devices))
    cfg.data.statistics = "table"  # constants of the step: no dataset is needed to compile with other ones
    mesh = meshes.make_mesh(cfg.mesh.to_dict(), devices)
    plan = plans.make_plan(cfg, plans.make_contract(cfg), mesh)
    kind, per_chip = devices[0].device_kind, chips.devices_per_chip(devices)
    if kind not in chips.CHIPS:
        raise ValueError(f"no data sheet for {kind!r} in core/chips.py; there are {', '.join(chips.CHIPS)}")
    chip = chips.CHIPS[kind]
    limit = chip.hbm_limit // per_chip

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
        "hbm_limit_bytes": limit,
        "compile_seconds": seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(plan.state.params)),
        **{f"{name}_bytes": held(getattr(plan.state, name)) for name in checkpoint.TREES},
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

    memory = compiled.memory_analysis()
    program = hlo.read(compiled.as_text())
    moved = hlo.collectives(program, [getattr(one, "slice_index", 0) for one in mesh.devices.flat])
    ici = sum(one.wire - one.between_slices for one in moved.values())
    dcn = sum(one.between_slices for one in moved.values())
    hbm = hlo.hbm_bytes(program)
    peak = memory.peak_memory_in_bytes  # with the arguments; temp_size_in_bytes ignores what shares memory
    times = {
        "compute": executed / (chip.flops / per_chip),
        "hbm": hbm / (chip.hbm_bytes_per_s / per_chip),
        "ici": ici / (chip.ici_bytes_per_s / per_chip),
        "dcn": dcn / (chips.DCN_BYTES_PER_S / per_chip),
    }
    step = max(times.values())
    return {
        **result,
        "fits": peak <= limit,
        "peak_hbm_bytes": peak,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": peak - memory.argument_size_in_bytes,
        "hbm_traffic_bytes": hbm,
        "collective_bytes": ici + dcn,
        "ici_bytes": ici,
        "dcn_bytes": dcn,
        "collectives": {kind: one._asdict() for kind, one in moved.items()},
        "roofline_seconds": times,
        "roofline_step_seconds": step,
        "roofline_mfu": plan.flops / len(devices) / (chip.flops / per_chip) / step,
    }


def asked_for(refusal: str) -> int | None:
    """Bytes that the compiler's refusal asks for: the first size in it, "(10.51T)"; the limit follows. None without."""
    found = re.search(r"\(([\d.]+)([KMGT])\)", refusal)
    return int(float(found.group(1)) * 2 ** (10 * (1 + "KMGT".index(found.group(2))))) if found else None


def held(tree: trees.Tree) -> int:
    """Bytes one device holds of a tree of shapes with shardings."""
    return sharding.report(tree, jax.tree.map(lambda leaf: leaf.sharding, tree)).per_device


def largest_replicated(tree: trees.Tree) -> int:
    """Bytes of the largest leaf that every device holds whole."""
    whole = [trees.size_bytes(leaf) for leaf in jax.tree.leaves(tree) if leaf.sharding.is_fully_replicated]
    return max(whole, default=0)


def render(r: dict[str, Any]) -> str:
    """The figures as text."""
    gib = lambda n: f"{n / GIB:8.2f} GiB"  # noqa: E731
    lines = [
        f"{r['config']} on {r['topology']} x {r['slices']}: {r['devices']} devices ({r['device']}), mesh {r['mesh']}, "
        f"global batch {r['global_batch']}, {r['parameters'] / 1e6:.1f} M parameters",
        f"compiled in {r['compile_seconds']:.0f} s at effort {r['effort']:g} by jax {r['jax']}'s libtpu; "
        "nothing was run",
        *([r["note"]] if r["note"] else []),
        "",
        "per device",
        *(
            f"  {name:22s} {gib(r[key])}"
            for name, key in (
                ("parameters", "params_bytes"),
                ("optimiser", "opt_bytes"),
                ("teacher", "teacher_bytes"),
                ("memory (centres, bank)", "memory_bytes"),
            )
        ),
    ]
    if "temporary_bytes" in r:
        lines.append(f"  {'activations and rest':22s} {gib(r['temporary_bytes'])}")
    if r["peak_hbm_bytes"] is not None:
        spare = r["hbm_limit_bytes"] - r["peak_hbm_bytes"]
        lines.append(
            f"  {'peak':22s} {gib(r['peak_hbm_bytes'])} of {r['hbm_limit_bytes'] / GIB:.2f}: "
            + (
                f"FITS, {spare / GIB:.2f} GiB to spare"
                if r["fits"]
                else f"DOES NOT FIT, {-spare / GIB:.2f} GiB too much"
            )
        )
    if "temporary_bytes" not in r:
        return "\n".join([*lines, f"  {r['refusal']}"])
    lines += ["", f"collectives per step and device ({r['collective_bytes'] / GIB:.2f} GiB sent)"]
    lines += [
        f"  {kind:22s} {gib(one['wire'])}  in {one['count']}, the largest {one['largest'] / 2**20:.1f} MiB"
        for kind, one in sorted(r["collectives"].items())
    ]
    lines += [
        "",
        f"model FLOPs of a step     {r['model_flops']:.3e} (all devices; rematerialisation not counted)",
        f"executed per device       {r['executed_flops']:.3e} (rematerialisation counted)",
        f"HBM traffic per device    {r['hbm_traffic_bytes'] / GIB:.1f} GiB",
        "roofline, seconds a step: "
        + ", ".join(f"{name} {seconds:.3f}" for name, seconds in r["roofline_seconds"].items()),
        f"  -> {r['roofline_step_seconds']:.3f} s, MFU {r['roofline_mfu']:.1%} at best (an upper bound: the "
        "longest of them, all else hidden)",
    ]
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> tuple[config_dict.ConfigDict, flags.FlagValues]:
    """Command line to (configuration, flags). ValueError for an unknown flag or field."""
    values = config.read_flags("compile-check", argv, define_flags, __doc__)
    if values.config is None or values.topology is None:
        raise ValueError("both --config FILE and --topology NAME are needed")
    if values.json and not pathlib.Path(values.json).absolute().parent.is_dir():  # said now, not after the compilation
        raise ValueError(f"--json={values.json}: there is no folder {pathlib.Path(values.json).parent}; make it first")
    return values.config, values


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    try:
        cfg, values = parse(argv)
        result = check(cfg, values.topology, values.slices, values.effort)
    except ValueError as error:
        print(f"skysense-jax compile-check: {error}", file=sys.stderr)
        return exits.BAD_INPUT
    except jax.errors.JaxRuntimeError as error:
        print(
            f"skysense-jax compile-check: the compiler failed, which says nothing about memory: {error}",
            file=sys.stderr,
        )
        return exits.COMPILER_FAILED
    print(render(result))
    if values.json:
        write_atomically(pathlib.Path(values.json), (json.dumps(result, indent=1) + "\n").encode())
    return exits.DONE if result["fits"] else exits.TOO_LARGE
