"""A run that is killed again and again, at random moments of every phase, ends in the same bits as one left alone.

    python -m tests.survival --kills 50 --out docs/survival.md

Real processes of the real command with the real SkySense objective, SIGKILL. What is compared: every array of the last
checkpoint, the records of metrics.jsonl (losses and the digest of the places of every batch, each step once), and the
evaluation of the result. A run lives through a few kills and ends; then a new one begins.
"""
from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from typing import Any, Callable, NamedTuple

import jax
import numpy as np

from skysense_jax import evaluate
from skysense_jax.run import checkpoint
from skysense_jax.run.folder import COMPLETE
from tests import jobs, tiny

STEPS, SAVE_EVERY = 12, 3
KILLS_PER_RUN = 8  # then it may end, and is compared
PHASES = ("compile", "step", "save", "eval")


class Kill(NamedTuple):
    """aimed, seen: phase that was to be hit and that was; step: last one recorded; after_s: since the start."""

    aimed: str
    seen: str
    step: int
    after_s: float


class Outcome(NamedTuple):
    """What a finished run is judged by. report: tasks of its evaluation."""

    arrays: dict[str, np.ndarray]
    records: list[dict]
    report: dict[str, Any]


def arguments(dataset: str, workdir: pathlib.Path) -> list[str]:
    return ["--config", jobs.TINY, "--workdir", str(workdir), f"--config.data.dir={dataset}",
            f"--config.steps={STEPS}", f"--config.run.save_every={SAVE_EVERY}"]


def start_evaluation(dataset: str, workdir: pathlib.Path) -> Any:
    return jobs.start(["eval", str(workdir), "--data", dataset, "--task", "scene", "--out", str(report_of(workdir))],
                      module="skysense_jax.cli")


def report_of(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "eval.json"


def outcome(dataset: str, workdir: pathlib.Path) -> Outcome:
    """Of a run that has ended."""
    jobs.finish(start_evaluation(dataset, workdir))
    return Outcome(jobs.arrays(workdir, STEPS), jobs.without_clocks(jobs.records(workdir)),
                   json.loads(report_of(workdir).read_text())["tasks"])


def straight(dataset: str, workdir: pathlib.Path) -> Outcome:
    """The run left alone; it also fills the compile cache."""
    jobs.finish(jobs.start(arguments(dataset, workdir)))
    return outcome(dataset, workdir)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    """Bit for bit."""
    jobs.assert_same(ours.arrays, theirs.arrays)
    assert [record["step"] for record in ours.records] == list(range(1, STEPS + 1))
    assert ours.records == theirs.records
    assert ours.report == theirs.report


def survive(
    dataset: str, wanted: Outcome, folder: pathlib.Path, kills: int, seed: int,
    note: Callable[[list[Kill], int], None] = lambda kills, lives: None,
) -> list[Kill]:
    """`kills` kills that hit what they aimed at, as many of each phase, and those that did not; every run is compared
    with `wanted`. note(kills so far, number of runs they were spread over) is called after each run.
    """
    draw = random.Random(seed)
    aims = [PHASES[n % len(PHASES)] for n in range(kills)]
    draw.shuffle(aims)
    done: list[Kill] = []
    lives, spans = 0, {"compile": 10.0, "eval": 10.0}  # seconds such a phase takes here, kept up to date
    while aims:
        workdir = folder / f"run-{lives}"
        lives += 1
        enough = len(done) + KILLS_PER_RUN
        while aims and len(done) < enough and not (workdir / COMPLETE).exists():
            if aims[0] == "eval" and not checkpoint.steps(workdir / checkpoint.FOLDER):
                later = next((n for n, aim in enumerate(aims) if aim != "eval"), None)
                if later is None:  # nothing to evaluate yet, nothing else to aim at
                    break
                aims[0], aims[later] = aims[later], aims[0]
            kill = _kill(dataset, workdir, aims[0], draw, spans)
            if kill is None:  # the run or the evaluation was over first
                continue
            done.append(kill)
            if kill.seen == aims[0]:
                aims.pop(0)
            print(f"kill {len(done)}, {len(aims)} to come: {kill}", file=sys.stderr, flush=True)
        if not (workdir / COMPLETE).exists():
            jobs.finish(jobs.start(arguments(dataset, workdir)))
        enough = len(done) + KILLS_PER_RUN
        while aims and aims[0] == "eval" and len(done) < enough:
            if (kill := _kill(dataset, workdir, aims[0], draw, spans)) is not None:
                aims.pop(0)
                done.append(kill)
        assert_same(outcome(dataset, workdir), wanted)
        note(done, lives)
    return done


def _kill(
    dataset: str, workdir: pathlib.Path, aim: str, draw: random.Random, spans: dict[str, float]
) -> Kill | None:
    """One process, killed at a random moment of the phase; None where it was over before."""
    last = max(checkpoint.steps(workdir / checkpoint.FOLDER), default=0)
    evaluation = aim == "eval"
    goal = draw.randrange(last + 1, max(min(last + SAVE_EVERY + 2, STEPS), last + 2))
    recorded = jobs.reached(workdir, goal)
    left = {path.name for path in jobs.saving(workdir)}  # by the kills before, until the process to come removes them
    begun_saves: set[str] = set()

    def saving() -> bool:
        now = {path.name for path in jobs.saving(workdir)}
        left.intersection_update(now)
        begun_saves.update(now - left)
        return bool(now - left)

    which = draw.randrange(2)  # the first save of the process, or the second: a run gets on between its kills
    begun = time.monotonic()
    process = start_evaluation(dataset, workdir) if evaluation else jobs.start(arguments(dataset, workdir))
    if aim in spans:
        moment: Callable[[], bool] = lambda: True
        delay = draw.uniform(0, spans[aim])
    else:
        moment = recorded if aim == "step" else lambda: saving() and len(begun_saves) > which
        delay = draw.uniform(0, 0.03)
    while process.poll() is None and not moment():
        assert time.monotonic() < begun + jobs.PATIENCE_S, "the run did not get there"
        saving()
        time.sleep(0.0005)
    until = time.monotonic() + delay
    while process.poll() is None and time.monotonic() < until:
        saving()
        time.sleep(0.0005)
    process.kill()
    after = time.monotonic() - begun
    [(code, said)] = jobs.ended([process])
    if code == 0:
        spans[aim] = min(after, spans.get(aim, after))
        return None
    assert code == -9, f"exit code {code}: {said}"
    lines = jobs.records(workdir)
    step = lines[-1]["step"] if lines else 0
    if evaluation:
        assert not report_of(workdir).exists() or json.loads(report_of(workdir).read_text())["tasks"]
        return Kill(aim, "eval", step, after)
    if "starting from" not in said and "resuming from" not in said:
        seen = "compile"
    else:
        seen = "save" if saving() else "step"
        spans["compile"] = min(after, spans["compile"])
    return Kill(aim, seen, step, after)


def report(kills: list[Kill], lives: int, asked: int, seed: int, seconds: float) -> str:
    """What happened so far, as a page."""
    seen = Counter(kill.seen for kill in kills)
    lines = [
        "# Survival: killed at random, and the same bits", "",
        f"`python -m tests.survival --kills {asked} --seed {seed} --out docs/survival.md`, commit "
        f"{evaluate.commit()}, jax {jax.__version__}, Python {platform.python_version()}, CPU, {os.cpu_count()} cores, "
        f"{seconds / 60:.0f} minutes.", "",
        f"{len(kills)} SIGKILLs were spread over {lives} run{'s' * (lives > 1)} of {STEPS} steps of "
        f"`configs/skysense_tiny.py:series` (the real objective on noise, float32, a checkpoint every {SAVE_EVERY} "
        "steps). Each run was started again after every kill until it ended. All of them ended bitwise equal to the "
        "run left alone: every array of the last checkpoint, every record of metrics.jsonl (each step once), and "
        "the evaluation.", "",
        "Phase by what the process had said and written when it died: compile = from the start of the interpreter to "
        "the compiled step; step = restoring or stepping; save = a checkpoint was being written; eval = "
        "`skysense-jax eval`.",
        "", "| phase | kills |", "|---|---|", *(f"| {phase} | {seen[phase]} |" for phase in PHASES), "",
        "| kill | aimed at | hit | last step recorded | seconds after the start |", "|---|---|---|---|---|",
        *(f"| {n} | {k.aimed} | {k.seen} | {k.step} | {k.after_s:.2f} |" for n, k in enumerate(kills, 1)),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="page to write")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "skysense_jax_survival"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        dataset = tiny.write_dataset(root / "places")
        wanted = straight(dataset, root / "straight")
        survive(dataset, wanted, root, options.kills, options.seed, lambda kills, lives: options.out.write_text(
            report(kills, lives, options.kills, options.seed, time.monotonic() - begun)))


if __name__ == "__main__":
    main()
