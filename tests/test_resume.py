"""A run that is really killed, and really started again, ends in the same bits as a run that was left alone.

Real processes, real signals, the real SkySense objective and input pipeline, float32 on one CPU device. What is
compared: parameters, optimiser, teacher, memory, counters, and the records of metrics.jsonl (losses and the digest of
the places of every batch, each step once).
"""
from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from typing import Callable

import numpy as np
import pytest

from skysense_jax.core import trees
from skysense_jax.run import checkpoint, metrics
from tests import tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY, PATIENCE_S = 12, 3, 600


def command(dataset: str, workdir: pathlib.Path) -> list[str]:
    return [
        sys.executable, "-m", "skysense_jax.train", "--config", str(ROOT / "configs" / "skysense_tiny.py:series"),
        "--workdir", str(workdir), f"--config.data.dir={dataset}",
        f"--config.steps={STEPS}", f"--config.run.save_every={SAVE_EVERY}",
    ]


def start(dataset: str, workdir: pathlib.Path) -> subprocess.Popen:
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        command(dataset, workdir), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(dataset: str, workdir: pathlib.Path) -> str:
    process = start(dataset, workdir)
    said = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 0, said
    return said


def interrupt(dataset: str, workdir: pathlib.Path, when: Callable[[float], bool], how: int = signal.SIGKILL) -> int:
    """Starts the run and sends `how` as soon as `when(unix time of the start)`; returns the exit code."""
    begun, process = time.time(), start(dataset, workdir)
    while not when(begun):
        assert process.poll() is None, f"over before it was interrupted: {process.communicate()[1]}"
        assert time.time() < begun + PATIENCE_S, "the run did not get there"
        time.sleep(0.0005)
    process.send_signal(how)
    process.communicate(timeout=PATIENCE_S)
    return process.returncode


def records(workdir: pathlib.Path) -> list[dict]:
    file = workdir / metrics.FILE
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def reached(workdir: pathlib.Path, step: int) -> Callable[[float], bool]:
    """Whether the process started at `begun` has itself recorded `step` (records of an earlier one may still lie
    there).
    """
    return lambda begun: any(r["step"] >= step and r["time"]["unix"] > begun for r in records(workdir)[-1:])


def saving(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Folders of saves that have begun and are not complete."""
    folder = workdir / checkpoint.FOLDER
    return [path for path in folder.iterdir() if "tmp" in path.name] if folder.exists() else []


def outcome(workdir: pathlib.Path) -> tuple[dict[str, bytes], list[dict]]:
    """Every array of the last checkpoint as bytes, and the records without their clocks."""
    arrays = {}
    for part in ("params", "opt", "teacher", "memory", "counters"):
        for name, leaf in trees.flatten(checkpoint.load_tree(workdir, part, step=STEPS)).items():
            arrays[f"{part}/{name}"] = np.asarray(leaf).tobytes()
    return arrays, [{k: v for k, v in record.items() if k != "time"} for record in records(workdir)]


def assert_same(ours: tuple, straight: tuple) -> None:
    assert ours[0].keys() == straight[0].keys()
    different = [name for name in ours[0] if ours[0][name] != straight[0][name]]
    assert not different, f"{len(different)} of {len(ours[0])} arrays differ: {different[:5]}"
    assert [record["step"] for record in ours[1]] == list(range(1, STEPS + 1))
    assert ours[1] == straight[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return tiny.write_dataset(tmp_path_factory.mktemp("places"))


@pytest.fixture(scope="module")
def straight(dataset, tmp_path_factory) -> tuple:
    """The outcome of the run left alone (it also warms the compile cache of the others)."""
    workdir = tmp_path_factory.mktemp("straight")
    finish(dataset, workdir)
    arrays, lines = outcome(workdir)
    assert len({record["places"] for record in lines}) == STEPS  # every batch is another one
    assert lines[-1]["loss"] != lines[0]["loss"] and lines[-1]["skipped"] == 0
    return arrays, lines


def test_interrupted_in_every_way_and_still_the_same_bits(dataset, straight, tmp_path):
    """SIGKILL at a random record; SIGKILL inside a save; SIGTERM; a flipped byte in the newest checkpoint; SIGKILL
    again; to the end.

    One run lives through all of it: a start costs seconds of tracing, and each interruption finds what the one before
    left behind.
    """
    draw = random.Random(20261122)
    folder = tmp_path / checkpoint.FOLDER
    first = draw.randrange(1, SAVE_EVERY)
    assert interrupt(dataset, tmp_path, reached(tmp_path, first)) == -signal.SIGKILL

    # Inside a save. The moment is short: a kill that falls just after it is one more kill at a random step.
    for _ in range(3):
        assert interrupt(dataset, tmp_path, lambda _: bool(saving(tmp_path))) == -signal.SIGKILL
        if saving(tmp_path):
            break
    assert saving(tmp_path), "no kill fell inside a save"
    before = checkpoint.steps(folder)

    # SIGTERM: saved at the step where it came, exit code 75, and the next start goes on from there.
    here = max(before, default=SAVE_EVERY) + 1
    there = reached(tmp_path, here)
    when = lambda begun: there(begun) and bool(checkpoint.steps(folder))  # the byte below must leave one to go back to
    assert interrupt(dataset, tmp_path, when, signal.SIGTERM) == 75
    newest = checkpoint.steps(folder)[-1]
    assert here <= newest < STEPS and not saving(tmp_path)
    assert [record["step"] for record in records(tmp_path)] == list(range(1, newest + 1))

    # A flipped byte in that checkpoint: named, set aside, and only the steps since the one before are done again.
    file = max((f for f in (folder / str(newest) / "params").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    older = checkpoint.steps(folder)[-2:-1]
    later = draw.randrange(max(older, default=0) + 1, STEPS - 1)
    assert interrupt(dataset, tmp_path, reached(tmp_path, later)) == -signal.SIGKILL
    assert (tmp_path / checkpoint.REJECTED / f"{newest}-0" / "REASON.txt").read_text().strip()

    said = finish(dataset, tmp_path)
    assert "resuming from step" in said and f"done: {STEPS} steps" in said and not saving(tmp_path)
    assert_same(outcome(tmp_path), straight)
