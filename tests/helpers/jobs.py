"""Training processes as a scheduler starts them: real commands, real signals; and what such a run left behind.

As a program it is the train command with two additions for the suite: the recipe "toy" (toy_objective.py, wide enough
to be split over fsdp), and, with READS=FILE, the numbers of the records this process reads, one to a line:

    python -m tests.helpers.jobs --config FILE --workdir DIR [--config.field=value ...]
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from skysense_jax import recipes, train
from skysense_jax.core import trees
from skysense_jax.data import records as dataset_records
from skysense_jax.run import checkpoint
from skysense_jax.run.log import metrics
from tests.helpers import toy_objective

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOY = str(ROOT / "tests" / "helpers" / "toy_config.py")
TINY = str(ROOT / "configs" / "skysense_tiny.py:series")
MSGFM = str(ROOT / "configs" / "msgfm_tiny.py")
QUICK = {
    TINY: ("--config.data.n_local=0",),
    MSGFM: ("--config.model.depths=(2,)", "--config.model.num_heads=(2,)", "--config.model.moe.stages=(0,)"),
}
"""Configuration -> what halves the time to trace and compile its step, which every process of a job spends anew: no
local views (the terms stay the same), one stage.
"""
PATIENCE_S = 1800
TOY_WIDTH = 2**15


def start(
    arguments: Sequence[str], devices: int = 1, module: str = "skysense_jax.train", **environment: str
) -> subprocess.Popen:
    """One process on `devices` fake CPU devices; its stderr can be read."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def start_together(
    count: int,
    arguments: Sequence[str],
    devices: int = 1,
    module: str = "skysense_jax.train",
    each: Callable[[int], dict[str, str]] = lambda index: {},
    **environment: str,
) -> list[subprocess.Popen]:
    """`count` processes of one job. On the CPU only process 0 writes the compile cache, and gloo waits 30 s for a
    process that still compiles: without the cache they all compile for as long.
    """
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    job = {
        "SKYSENSE_PROCESSES": str(count),
        "SKYSENSE_COORDINATOR": f"localhost:{port}",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        **environment,
    }
    return [
        start(arguments, devices, module, **{**job, "SKYSENSE_PROCESS_INDEX": str(index), **each(index)})
        for index in range(count)
    ]


def ended(processes: Sequence[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, stderr) of each process, once all have ended; those that do not are killed."""
    try:
        said = [process.communicate(timeout=PATIENCE_S)[1] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def finish(process: subprocess.Popen) -> str:
    """What a process that ends with 0 said."""
    [(code, said)] = ended([process])
    assert code == 0, said
    return said


def await_moment(process: subprocess.Popen, when: Callable[[], bool]) -> None:
    """Returns as soon as `when()`; a process that ends before is a failure."""
    begun = time.monotonic()
    while not when():
        assert process.poll() is None, f"over before it was interrupted: {process.communicate()[1]}"
        assert time.monotonic() < begun + PATIENCE_S, "the run did not get there"
        time.sleep(0.0005)


def interrupt(process: subprocess.Popen, when: Callable[[], bool], how: int = signal.SIGKILL) -> tuple[int, str]:
    """Sends `how` as soon as `when()`; (exit code, stderr)."""
    await_moment(process, when)
    process.send_signal(how)
    return ended([process])[0]


def records(workdir: pathlib.Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    file = workdir / metrics.FILE
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def without_clocks(lines: Sequence[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def reached(workdir: pathlib.Path, step: int) -> Callable[[], bool]:
    """Whether `step` was recorded from now on (records of an earlier process may still lie there)."""
    begun = time.time()
    return lambda: any(r["step"] >= step and r["time"]["unix"] > begun for r in records(workdir)[-1:])


def saving(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Folders of saves that have begun and are not complete."""
    folder = workdir / checkpoint.FOLDER
    return [path for path in folder.iterdir() if "tmp" in path.name] if folder.exists() else []


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file: pathlib.Path) -> None:
    """Damages the byte in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of one checkpoint by name."""
    return {
        f"{part}/{name}": np.asarray(leaf)
        for part in checkpoint.load_meta(workdir, step)["digests"]
        for name, leaf in trees.flatten(checkpoint.load_tree(workdir, part, step=step)).items()
    }


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert not different, f"{len(different)} of {len(ours)} arrays differ: {different[:5]}"


def assert_close(ours: Sequence[dict], theirs: Sequence[dict], tolerance: float) -> None:
    """Records of two runs: the same steps, places and counts; every number within `tolerance`, relative to 1 where it
    is smaller.
    """
    assert len(ours) == len(theirs)
    for a, b in zip(without_clocks(ours), without_clocks(theirs), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, float):
                assert abs(value - b[name]) <= tolerance * max(1.0, abs(b[name])), (a["step"], name, value, b[name])
            else:
                assert value == b[name], (a["step"], name, value, b[name])


def _log_reads(file: str) -> None:
    honest = dataset_records.Places.__getitem__

    def logged(self: dataset_records.Places, index: Any) -> dict[str, Any]:
        with open(file, "a") as out:
            out.write(f"{int(index)}\n")
        time.sleep(float(os.environ.get("READ_S", "0")))
        return honest(self, index)

    dataset_records.Places.__getitem__ = logged


if __name__ == "__main__":
    recipes.RECIPES["toy"] = toy_objective.recipe(width=TOY_WIDTH)
    if "READS" in os.environ:
        _log_reads(os.environ["READS"])
    sys.exit(train.main())
