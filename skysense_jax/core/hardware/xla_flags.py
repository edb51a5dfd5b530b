"""Compiler flags per platform and TPU generation, each with its reason and source.

This module sets environment variables only and never imports jax.

XLA reads XLA_FLAGS, and libtpu reads LIBTPU_INIT_ARGS, when the first device is looked up, so :func:`apply` runs before
that. A flag the user has already set is left alone. The TPU flags are what public sources use for a generation; libtpu
accepts them (it ends the process on one it does not know), their effect on this model has not been measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import MutableMapping
from typing import NamedTuple


class Flag(NamedTuple):
    """One compiler flag.

    Attributes:
        text: as on a command line.
        reason: why it is set.
        source: who says so.
        generations: TPU generations that get it; () for all.
    """

    text: str
    reason: str
    source: str
    generations: tuple[str, ...] = ()


VARIABLES = {"cpu": "XLA_FLAGS", "gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
"""The environment variable that each platform's compiler reads."""

OPENXLA = "openxla.org/xla/flags_guidance"
MAXTEXT = "AI-Hypercomputer/maxtext, src/maxtext/configs/tpu"

FLAGS: dict[str, tuple[Flag, ...]] = {
    "cpu": (
        Flag(
            "--xla_backend_optimization_level=1",
            "a quarter less to compile (109 s against 146 s of CPU), the step as fast as at 3",
            "measured on the smoke step",
        ),
    ),
    "gpu": (
        Flag(
            "--xla_gpu_enable_latency_hiding_scheduler=true",
            "overlap the gathers of the next layer's parameters with this layer's matrix products",
            OPENXLA,
        ),
    ),
    "tpu": (
        Flag(
            "--xla_enable_async_all_gather=true",
            "fsdp gathers every layer's parameters: let a gather run while something else computes",
            f"{MAXTEXT}/v4/22b.sh, v5e/16b.sh, v5p/1024b.sh, v6e/gpt3_175b.sh",
            ("v4", "v5e", "v5p", "v6e"),
        ),
        Flag(
            "--xla_tpu_enable_async_collective_fusion=true",
            "fuse such a gather with the compute it does not depend on",
            f"{OPENXLA} (v5e); {MAXTEXT}/v5p, v6e",
            ("v5e", "v5p", "v6e"),
        ),
        Flag(
            "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
            "the kind of collective that the fusion takes up",
            f"{OPENXLA} (v5e); {MAXTEXT}/v5p, v6e",
            ("v5e", "v5p", "v6e"),
        ),
        Flag(
            "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
            "spread one gather over several pieces of compute: a layer's parameters outlast a single one",
            f"{MAXTEXT}/v5e, v5p, v6e",
            ("v5e", "v5p", "v6e"),
        ),
        Flag(
            "--xla_tpu_overlap_compute_collective_tc=true",
            "the fused gather and the compute share the tensor core",
            f"{MAXTEXT}/v5e, v5p, v6e",
            ("v5e", "v5p", "v6e"),
        ),
        Flag(
            "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
            "several slices: more of the gradients' all-reduce over the data axis (DCN) hidden behind compute",
            f"{OPENXLA}; {MAXTEXT}/v5e, v5p, v6e/gpt3_175b.sh",
            ("v5e", "v5p", "v6e"),
        ),
        Flag(
            "--xla_tpu_enable_ag_backward_pipelining=true",
            "the layers are a scan: start the next iteration's gather in this one",
            f"{OPENXLA}; {MAXTEXT}/v5p",
            ("v5p",),
        ),
        Flag(
            "--xla_tpu_megacore_fusion_allow_ags=false",
            "two cores work as one: leave gathers to the fusion above, not to that of convolutions and all-reduces",
            f"{OPENXLA}; {MAXTEXT}/v5p",
            ("v5p",),
        ),
        Flag(
            "--xla_tpu_scoped_vmem_limit_kib=98304",
            "128 MiB of vector memory, of which one operation gets 16 by default: larger tiles for large products",
            "AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py; configs/tpu/v6e",
            ("v6e",),
        ),
        Flag(
            "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false",
            "gathers run on the sparse cores by default there, and only one of the two ways may be on",
            "AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py (Ironwood)",
            ("tpu7x",),
        ),
    ),
}

GENERATIONS = {"v4": "v4", "v5lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "tpu7x", "v7x": "tpu7x"}
"""What an accelerator's name contains (dashes left out) -> TPU generation."""

ONCE: dict[str, dict[str, int]] = {"cpu": {"xla_backend_optimization_level": 0}}
"""Compiler options by jax backend for a program that runs once, as making the first parameters (14 s against 41 s)."""


def platform(env: MutableMapping[str, str]) -> str:
    """The platform that the run will use: "tpu", "gpu" or "cpu".

    JAX_PLATFORMS decides where it is set; otherwise what is installed (libtpu, then jax's CUDA plugin); otherwise cpu.
    """
    named = env.get("JAX_PLATFORMS", "").split(",")[0].strip()
    if named:
        return "gpu" if named in ("cuda", "rocm") else named
    if importlib.util.find_spec("libtpu") is not None:
        return "tpu"
    if any(importlib.util.find_spec(f"jax_cuda{n}_plugin") is not None for n in (12, 13)):
        return "gpu"
    return "cpu"


def generation(env: MutableMapping[str, str]) -> str | None:
    """The TPU generation that the environment names; None where it names no known generation.

    The accelerator's name stands in TPU_ACCELERATOR_TYPE (GKE sets it) or in TPU_TYPE (launch/ sets it), as
    "v5litepod-256" or "tpu-v5-lite-podslice".
    """
    for variable in ("TPU_ACCELERATOR_TYPE", "TPU_TYPE"):
        name = env.get(variable, "").lower().replace("-", "")
        for spelling, tpu_generation in GENERATIONS.items():
            if spelling in name:
                return tpu_generation
    return None


def flags(platform: str, generation: str | None = None) -> list[str]:
    """Flags of a platform; on TPU those of the generation.

    Args:
        platform: "cpu", "gpu" or "tpu"; an unknown one gets no flags.
        generation: of the TPU; an unknown one gets the flags of all generations only.

    Returns:
        The flags as on a command line.
    """
    return [flag.text for flag in FLAGS.get(platform, ()) if not flag.generations or generation in flag.generations]


def apply(env: MutableMapping[str, str], target: str | None = None) -> list[str]:
    """Adds the flags of the platform and TPU generation to an environment.

    Args:
        env: normally os.environ; a flag that is set in it already stays as it is.
        target: the platform to compile for; None: the platform that the program runs on.

    Returns:
        The flags that were added.
    """
    compiled_for = target or platform(env)
    variable = VARIABLES.get(compiled_for, "XLA_FLAGS")
    present = env.get(variable, "")
    names_present = {flag.split("=")[0] for flag in present.split()}
    added = [flag for flag in flags(compiled_for, generation(env)) if flag.split("=")[0] not in names_present]
    if added:
        env[variable] = " ".join([present, *added]).strip()
    return added
