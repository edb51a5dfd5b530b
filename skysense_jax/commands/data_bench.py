"""`skysense-jax data bench`: how fast the input pipeline is on this machine, with a given dataset and configuration.

CPU time of this process, not the wall clock, is what "per core" divides by, so that other work on the machine doesn't
change the figure.
"""

from __future__ import annotations

import argparse
import itertools
import os
import resource
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import config_dict

from skysense_jax import recipes, sensors
from skysense_jax.core import exits
from skysense_jax.core.config import read_config
from skysense_jax.core.trees import Tree

SAMPLED = 16
"""Records in memory that the stage without reading uses in turn."""


class Rate(NamedTuple):
    """The measurement of one stage.

    Attributes:
        places_per_s: places per second of wall clock.
        places_per_core_s: places per second of CPU time.
        mb_per_s: MB (1e6 bytes) per second of wall clock.
    """

    places_per_s: float
    places_per_core_s: float
    mb_per_s: float


def _measure(produce: Callable[[], tuple[int, int]], seconds: float) -> Rate:
    """Calls `produce` -> (places, bytes) for about `seconds`, after one call that does not count."""
    produce()
    places = size = 0
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        more_places, more_bytes = produce()
        places, size = places + more_places, size + more_bytes
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Rate(places / wall, places / cpu, size / 1e6 / wall)


def bench(cfg: config_dict.ConfigDict, seconds: float = 5.0) -> dict[str, Rate]:
    """Measures the stages of the input pipeline.

    The input contract is the configuration's bands with the sensor table's statistics. A place of msGFM's batches is
    the image of one sensor of the place, with its pair.

    Args:
        cfg: the whole configuration.
        seconds: about how long each stage runs.

    Returns:
        Rates of three stages: "read" (decode records; bytes of the record), "place" (cut and augment, no reading) and
        "batches" (the training iterator with `config.data.threads`; bytes of the batch).

    Raises:
        ValueError: as `batches.views.train_dataset`.
    """
    training = recipes.recipe_of(cfg).batches
    contract = sensors.input_contract(cfg.data.bands.to_dict(), cfg.model.ratio)
    iterator = training.make_train_iterator(cfg, contract, cfg.seed)
    records, sample = training.stages(cfg, contract, cfg.seed)
    sampled = [records[batch * int(cfg.data.batch)] for batch in range(SAMPLED)]  # each batch of msGFM has one sensor
    turn = itertools.count()

    def read() -> tuple[int, int]:
        return 1, _bytes(records[next(turn)])

    def place() -> tuple[int, int]:
        number = next(turn)
        return 1, _bytes(sample(sampled[number % SAMPLED], np.random.default_rng(number)))

    def batches() -> tuple[int, int]:
        return cfg.data.batch, _bytes(next(iterator))

    rates = {"read": _measure(read, seconds), "place": _measure(place, seconds)}
    try:
        for _ in range(int(cfg.data.prefetch) + int(cfg.data.threads)):
            next(iterator)  # batches that are already waiting would flatter the rate
        rates["batches"] = _measure(batches, seconds)
    finally:
        iterator.close()
    return rates


def _bytes(tree: Tree) -> int:
    """Bytes of all arrays in a nested dict."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if isinstance(leaf, np.ndarray))


def _run_bench(args: argparse.Namespace) -> int:
    cfg = read_config(args.config)
    cfg.data.dir = args.dir
    if args.threads:
        cfg.data.threads = args.threads
    rates = bench(cfg, args.seconds)
    text = {
        "read": "read and decode records, 1 thread",
        "place": "crop and augment, 1 thread",
        "batches": f"training batches of {cfg.data.batch}, {cfg.data.threads} threads",
    }
    print(f"{args.dir} with {args.config}, {os.cpu_count()} cores, {args.seconds:g} s a line")
    for stage, rate in rates.items():
        print(
            f"{text[stage]:<42}{rate.places_per_s:>9.1f} places/s{rate.places_per_core_s:>9.1f} places/s per core"
            f"{rate.mb_per_s:>9.1f} MB/s"
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
    return exits.DONE


def add_parsers_bench(add_parser: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `bench` to the `data` commands; the parsed namespace carries `run(namespace) -> exit status`."""
    parser = add_parser("bench", help="measure the input pipeline: places/s, places/s per core, MB/s")
    parser.add_argument("dir", help="folder that `data build` wrote")
    parser.add_argument("--config", default="configs/skysense_smoke.py", help="configuration to measure")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of each of the three measurements")
    parser.add_argument("--threads", type=int, default=0, help="reader threads instead of config.data.threads")
    parser.set_defaults(run=_run_bench)
