"""A run that is killed again and again, at random moments of every phase, ends in the same bits as one left alone.

    python -m tests.survival [--model msgfm] --kills 50 --out docs/log/survival.md

Real processes of the real command with the real objective of a model, SIGKILL. What is compared: every array of the
last checkpoint, the records of metrics.jsonl (losses and the digest of the places of every batch, each step once), and
the evaluation of the result. A run lives through a few kills and ends; then a new one begins.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from skysense_jax import evaluation as evaluate
from skysense_jax.run import checkpoint
from skysense_jax.run.folder import COMPLETE
from tests.helpers import jobs, msgfm_places, noise_dataset

STEPS, SAVE_EVERY = 12, 3
KILLS_PER_RUN = 8  # then it may end, and is compared
PHASES = ("compile", "step", "save", "eval")
CONFIGS = {"skysense": jobs.TINY, "msgfm": jobs.MSGFM}
TITLE = """# Survival: killed at random, and the same bits

Every run was started again after every kill until it ended. All of them ended bitwise equal to the run left alone:
every array of the last checkpoint, every record of metrics.jsonl (each step once), and the evaluation.

Phase by what the process had said and written when it died: compile = from the start of the interpreter to the
compiled step; step = restoring or stepping; save = a checkpoint was being written; eval = `skysense-jax eval`.
"""


class Job(NamedTuple):
    """A model and what it learns from. dataset: of places, it is evaluated on it; also: further data, as a flag."""

    model: str
    dataset: str
    also: tuple[str, ...] = ()


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


def make_job(model: str, folder: pathlib.Path) -> Job:
    """msgFM: places of which some lack a sensor, and unpaired pictures."""
    if model == "skysense":
        return Job(model, noise_dataset.write_dataset(folder / "places"))
    pictures = msgfm_places.write_pictures(folder / "pictures")
    return Job(model, msgfm_places.write(folder / "places"), (f"--config.data.also=({pictures!r},)",))


def arguments(job: Job, workdir: pathlib.Path) -> list[str]:
    return [
        "--config",
        CONFIGS[job.model],
        "--workdir",
        str(workdir),
        f"--config.data.dir={job.dataset}",
        *job.also,
        *jobs.QUICK[CONFIGS[job.model]],
        f"--config.steps={STEPS}",
        f"--config.run.save_every={SAVE_EVERY}",
    ]


def start_evaluation(job: Job, workdir: pathlib.Path) -> Any:
    return jobs.start(
        ["eval", str(workdir), "--data", job.dataset, "--task", "scene", "--out", str(report_of(workdir))],
        module="skysense_jax.cli",
    )


def report_of(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "eval.json"


def outcome(job: Job, workdir: pathlib.Path) -> Outcome:
    """Of a run that has ended."""
    jobs.finish(start_evaluation(job, workdir))
    return Outcome(
        jobs.arrays(workdir, STEPS),
        jobs.without_clocks(jobs.records(workdir)),
        json.loads(report_of(workdir).read_text())["tasks"],
    )


def straight(job: Job, workdir: pathlib.Path) -> Outcome:
    """The run left alone; it also fills the compile cache."""
    jobs.finish(jobs.start(arguments(job, workdir)))
    return outcome(job, workdir)


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    """Bit for bit."""
    jobs.assert_same(ours.arrays, theirs.arrays)
    assert [record["step"] for record in ours.records] == list(range(1, STEPS + 1))
    assert ours.records == theirs.records
    assert ours.report == theirs.report


def survive(
    job: Job,
    wanted: Outcome,
    folder: pathlib.Path,
    kills: int,
    seed: int,
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
            kill = _kill(job, workdir, aims[0], draw, spans)
            if kill is None:  # the run or the evaluation was over first
                continue
            done.append(kill)
            if kill.seen == aims[0]:
                aims.pop(0)
            print(f"kill {len(done)}, {len(aims)} to come: {kill}", file=sys.stderr, flush=True)
        if not (workdir / COMPLETE).exists():
            jobs.finish(jobs.start(arguments(job, workdir)))
        enough = len(done) + KILLS_PER_RUN
        while aims and aims[0] == "eval" and len(done) < enough:
            if (kill := _kill(job, workdir, aims[0], draw, spans)) is not None:
                aims.pop(0)
                done.append(kill)
        assert_same(outcome(job, workdir), wanted)
        note(done, lives)
    return done


def _kill(job: Job, workdir: pathlib.Path, aim: str, draw: random.Random, spans: dict[str, float]) -> Kill | None:
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
    process = start_evaluation(job, workdir) if evaluation else jobs.start(arguments(job, workdir))
    if aim in spans:

        def moment() -> bool:
            return True

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


def report(job: Job, kills: list[Kill], lives: int, asked: int, seed: int, seconds: float) -> str:
    """What happened so far, as a section of the page."""
    seen, config = Counter(kill.seen for kill in kills), pathlib.Path(CONFIGS[job.model]).relative_to(jobs.ROOT)
    changes = " ".join(jobs.QUICK[CONFIGS[job.model]])
    learnt = "noise" + " and a folder of unpaired pictures" * bool(job.also)
    lines = [
        f"## {job.model}",
        "",
        f"`python -m tests.survival --model {job.model} --kills {asked} --seed {seed} --out docs/log/survival.md`, "
        f"commit {evaluate.commit()}, jax {jax.__version__}, Python {platform.python_version()}, CPU, "
        f"{os.cpu_count()} cores, {seconds / 60:.0f} minutes.",
        "",
        f"{len(kills)} SIGKILLs were spread over {lives} run{'s' * (lives > 1)} of {STEPS} steps of `{config}` "
        f"with `{changes}` (the real objective on {learnt}, float32, a checkpoint every {SAVE_EVERY} steps).",
        "",
        "| phase | kills |",
        "|---|---|",
        *(f"| {phase} | {seen[phase]} |" for phase in PHASES),
        "",
        "| kill | aimed at | hit | last step recorded | seconds after the start |",
        "|---|---|---|---|---|",
        *(f"| {n} | {k.aimed} | {k.seen} | {k.step} | {k.after_s:.2f} |" for n, k in enumerate(kills, 1)),
    ]
    return "\n".join(lines) + "\n"


def write_section(page: pathlib.Path, section: str) -> None:
    """Puts a model's section in the place of its older one, or at the end of the page."""
    head, *sections = re.split(r"(?m)^(?=## )", page.read_text() if page.exists() else f"{TITLE}\n")
    title = section.splitlines()[0]
    at = next((n for n, one in enumerate(sections) if one.splitlines()[0] == title), len(sections))
    sections[at : at + 1] = [section]
    page.write_text(head + "\n".join(one.rstrip("\n") + "\n" for one in sections))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(CONFIGS), default="skysense")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="page that gets a section")
    options = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "skysense_jax_survival"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        job = make_job(options.model, root)
        wanted = straight(job, root / "straight")
        survive(
            job,
            wanted,
            root,
            options.kills,
            options.seed,
            lambda kills, lives: write_section(
                options.out, report(job, kills, lives, options.kills, options.seed, time.monotonic() - begun)
            ),
        )


if __name__ == "__main__":
    main()
