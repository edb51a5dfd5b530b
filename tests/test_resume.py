"""A run that is really killed, and really started again, ends in the same bits as a run that was left alone.

Real processes, real signals, the real objectives and input pipelines, float32 on one CPU device. What is
compared: parameters, optimiser, teacher, memory, counters, the records of metrics.jsonl (losses and the digest of the
places of every batch, each step once), and the evaluation.
"""

from __future__ import annotations

import random
import signal

import pytest

from skysense_jax.run import checkpoint
from tests import survival
from tests.helpers import jobs
from tests.survival import SAVE_EVERY, STEPS

KILLS = len(survival.PHASES)


@pytest.fixture(scope="module", params=list(survival.CONFIGS))
def job(request, tmp_path_factory) -> survival.Job:
    return survival.make_job(request.param, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(job, tmp_path_factory) -> survival.Outcome:
    """The outcome of the run left alone (it also warms the compile cache of the others)."""
    found = survival.straight(job, tmp_path_factory.mktemp("straight"))
    assert len({record["places"] for record in found.records}) == STEPS  # every batch is another one
    assert found.records[-1]["loss"] != found.records[0]["loss"] and found.records[-1]["skipped"] == 0
    return found


def test_killed_at_random_moments_of_every_phase_and_still_the_same_bits(job, straight, tmp_path):
    """Once each while it compiles, steps, saves, and is evaluated: `python -m tests.survival`, small."""
    kills = survival.survive(job, straight, tmp_path, KILLS, 20261122)
    assert len(kills) >= KILLS and {kill.seen for kill in kills} == set(survival.PHASES)


def test_stopped_and_damaged_and_still_the_same_bits(job, straight, tmp_path):
    """SIGTERM; a flipped byte in the checkpoint it left; SIGKILL; to the end. Each finds what the one before left."""
    folder = tmp_path / checkpoint.FOLDER

    def start():
        return jobs.start(survival.arguments(job, tmp_path))

    # SIGTERM: saved at the step where it came, exit code 75, and the next start goes on from there.
    there = jobs.reached(tmp_path, SAVE_EVERY + 1)

    def when():
        return there() and bool(checkpoint.steps(folder))  # the byte below must leave one to go back to

    code, said = jobs.interrupt(start(), when, signal.SIGTERM)
    assert code == 75 and "preempted: saved at step" in said
    newest = checkpoint.steps(folder)[-1]
    assert SAVE_EVERY < newest < STEPS and not jobs.saving(tmp_path)
    assert [record["step"] for record in jobs.records(tmp_path)] == list(range(1, newest + 1))

    # A flipped byte in that checkpoint: named, set aside, and only the steps since the one before are done again.
    jobs.flip(jobs.largest(folder / str(newest) / "params"))
    older = checkpoint.steps(folder)[-2:-1]
    later = random.Random(20261122).randrange(max(older, default=0) + 1, STEPS - 1)
    assert jobs.interrupt(start(), jobs.reached(tmp_path, later))[0] == -signal.SIGKILL
    assert (tmp_path / checkpoint.REJECTED / f"{newest}-0" / "REASON.txt").read_text().strip()

    said = jobs.finish(start())
    assert "resuming from step" in said and f"done: {STEPS} steps" in said and not jobs.saving(tmp_path)
    survival.assert_same(survival.outcome(job, tmp_path), straight)
