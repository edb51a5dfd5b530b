"""Several real processes of one job, on one machine over gloo: they meet or say who is missing, share the data and the
checkpoint, stop together, and compute what one process computes.
"""

from __future__ import annotations

import os
import pathlib
import signal
import socket
import threading
import time

import numpy as np
import pytest

from skysense_jax import recipes, train
from skysense_jax.core import mesh, rendezvous
from skysense_jax.run import checkpoint
from skysense_jax.run import plan as plans
from tests.helpers import jobs, msgfm_places, noise_dataset, toy_objective

STEPS, BATCH, PLACES = 12, 8, 40
MSGFM = ["--config", jobs.MSGFM, *jobs.QUICK[jobs.MSGFM]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    return noise_dataset.write_dataset(tmp_path_factory.mktemp("places"), PLACES)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> list[str]:
    """msGFM and its data: PLACES with paired sensors, and as many unpaired pictures."""
    folder = tmp_path_factory.mktemp("mixed")
    pictures = msgfm_places.write_pictures(folder / "pictures", PLACES)
    return [
        *MSGFM,
        f"--config.data.dir={msgfm_places.write(folder / 'places', PLACES)}",
        f"--config.data.also=({pictures!r},)",
    ]


def arguments(dataset: str | list[str], workdir: pathlib.Path, *more: str) -> list[str]:
    """dataset: of the toy, or all that another run is started with."""
    given = dataset if isinstance(dataset, list) else ["--config", jobs.TOY, f"--config.data.dir={dataset}"]
    return [
        *given,
        "--workdir",
        str(workdir),
        f"--config.steps={STEPS}",
        f"--config.data.batch={BATCH}",
        "--config.run.save_every=100",
        "--config.run.watchdog_s=600",
        *more,
    ]


def shares(given: list[str], processes: int, index: int, steps: range) -> list[int]:
    """The records that process `index` of `processes` needs in `steps`, by their number in their dataset."""
    cfg = train.parse(given).config
    batches = recipes.recipe_of(cfg).batches.train_dataset(cfg, plans.make_contract(cfg), cfg.seed)
    part = slice(index * BATCH // processes, (index + 1) * BATCH // processes)
    return [int(n) % PLACES for step in steps for n in batches[step]["place"]["index"][part]]


@pytest.mark.parametrize(
    "data, axis, split, indexed",
    [("dataset", "fsdp", 10 * jobs.TOY_WIDTH * 4, 0), ("mixed", "expert", 4 * 2 * 8 * 32 * 4, PLACES)],
    ids=["toy", "msgfm"],
)
def test_two_processes_stop_together_and_four_go_on_as_one_would(
    data, axis, split, indexed, request, tmp_path, monkeypatch
):
    """axis: of the mesh, that lies over the processes; split: bytes of the kernels that are split over it; indexed:
    records that every process looks into first, for the sensors they have.
    """
    given = request.getfixturevalue(data)
    monkeypatch.setitem(recipes.RECIPES, "toy", toy_objective.recipe(width=jobs.TOY_WIDTH))
    one, many = tmp_path / "one", tmp_path / "many"
    assert train.main(arguments(given, one)) == 0  # one process, eight devices

    def run(count: int, devices: int, *more: str) -> list:
        return jobs.start_together(
            count,
            arguments(given, many, *more),
            devices,
            "tests.helpers.jobs",
            lambda index: {"READS": str(tmp_path / f"reads-{count}-{index}")},
            READ_S="0.1" if count == 2 else "0",  # time for the signal to reach the other one
        )

    def read(count: int, index: int) -> list[int]:
        return [int(line) for line in (tmp_path / f"reads-{count}-{index}").read_text().split()]

    # Two processes, the state split over both; a signal to one of them stops both, at the same step.
    two = run(2, 2, f"--config.mesh.{axis}=4")
    jobs.await_moment(two[0], jobs.reached(many, 2))
    two[1].send_signal(signal.SIGTERM)
    over = jobs.ended(two)
    assert [code for code, _ in over] == [75, 75], over
    [stopped] = checkpoint.steps(many / checkpoint.FOLDER)
    assert 2 <= stopped < STEPS and [r["step"] for r in jobs.records(many)] == list(range(1, stopped + 1))
    parts = many / checkpoint.FOLDER / str(stopped) / "params"
    for index in range(2):  # each wrote its half of the kernels
        files = [file for file in (parts / f"ocdbt.process_{index}").rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) > split / 2 * 0.8, files

    # Four go on, on another mesh, to the end: the records are those of one process.
    over = jobs.ended(run(4, 1, "--config.mesh.data=2", f"--config.mesh.{axis}=2"))
    assert [code for code, _ in over] == [0] * 4, over
    assert f"resuming from step {stopped}" in over[0][1] and not over[1][1].count("resuming")
    jobs.assert_close(jobs.records(many), jobs.records(one), 1e-5)
    ours, theirs = (jobs.arrays(folder, STEPS) for folder in (many, one))
    assert ours.keys() == theirs.keys()
    # Adam divides rounding by rounding in single numbers.
    for part in {"/".join(name.split("/")[:2]) for name in theirs}:
        a, b = (
            np.concatenate(
                [value.ravel() for name, value in arrays.items() if name.startswith(f"{part}/") or name == part]
            ).astype(np.float64)
            for arrays in (ours, theirs)
        )
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b), part

    # Each read its share of the records, in order and no other (it may read some steps ahead).
    for count, first in ((2, 0), (4, stopped)):
        for index in range(count):
            numbers = read(count, index)
            assert len(numbers) >= indexed + ((stopped if count == 2 else STEPS) - first) * BATCH // count
            wanted = shares(arguments(given, many), count, index, range(first, first + 2 * STEPS))
            assert numbers == [*range(indexed), *wanted][: len(numbers)], (count, index)


def test_a_process_that_stands_still_ends_the_others_with_70_and_their_stacks(dataset, tmp_path):
    """SIGSTOP: the other one hangs in a collective, in C++, and only its watchdog can tell."""
    hung, still = jobs.start_together(
        2, arguments(dataset, tmp_path, "--config.steps=100000", "--config.run.watchdog_s=3"), 1, "tests.helpers.jobs"
    )
    try:
        jobs.await_moment(hung, jobs.reached(tmp_path, 3))
        still.send_signal(signal.SIGSTOP)
        [(code, said)] = jobs.ended([hung])
    finally:
        still.kill()
        still.communicate()
    assert code == 70 and "config.run.watchdog_s=3" in said
    assert "train.py" in (tmp_path / "stacks-0.txt").read_text() and "Current thread" in said


def test_a_missing_process_is_an_error_with_both_counts(dataset, tmp_path):
    """Processes 0 and 1 of three: neither trains, both say who is missing, well before jax would abort them."""
    over = jobs.ended(
        jobs.start_together(
            3,
            arguments(dataset, tmp_path),
            SKYSENSE_START_TIMEOUT_S="30",
            each=lambda index: {"SKYSENSE_PROCESSES": "x"} if index == 2 else {},
        )
    )
    assert [code for code, _ in over] == [78] * 3, over
    for _, said in over[:2]:
        assert "2 of 3 processes came together within 30 s; missing: 2" in said, said
    assert "SKYSENSE_PROCESSES='x': a whole number is needed" in over[2][1]
    assert not list(tmp_path.iterdir())


def test_jax_s_own_detection_gives_up_with_78(dataset, tmp_path):
    """Slurm's variables and no coordinator of ours: process 0 of two waits inside jax."""
    slurm = {
        "SLURM_JOB_ID": "3",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SKYSENSE_PROCESSES": "2",
        "SKYSENSE_START_TIMEOUT_S": "3",
    }
    [(code, said)] = jobs.ended([jobs.start(arguments(dataset, tmp_path), **slurm)])
    assert code == 78 and "2 processes are expected (SKYSENSE_PROCESSES), fewer came together within 3 s" in said, said


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS=4: Slurm started 4 processes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES=a,b: TPU pod started 2 processes"),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, None),
        ({"SLURM_NTASKS": "4", "SKYSENSE_PROCESSES": "1"}, None),
        ({"SKYSENSE_PROCESSES": "2", "SKYSENSE_COORDINATOR": "h:1"}, "go together"),
        ({"SKYSENSE_PROCESSES": "2", "SKYSENSE_COORDINATOR": "h", "SKYSENSE_PROCESS_INDEX": "0"}, "host:port"),
        ({"SKYSENSE_PROCESSES": "2", "SKYSENSE_COORDINATOR": "h:1", "SKYSENSE_PROCESS_INDEX": "2"}, "not in 0..1"),
    ],
)
def test_never_several_runs_of_one_process_each(environment, said, monkeypatch):
    for name, _ in mesh.CLUSTER_COUNTS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if said is None:
        assert mesh.start_processes() == (0, 1)
    else:
        with pytest.raises(ValueError, match=said):
            mesh.start_processes()


def gather(*callers: tuple[int, int, float], timeout_s: float = 20.0) -> list[str]:
    """What each (index, processes, start after s) was told; "" for all here."""
    with socket.create_server(("localhost", 0)) as listener:
        coordinator = f"localhost:{listener.getsockname()[1]}"
    told = [""] * len(callers)

    def call(number: int) -> None:
        index, processes, after = callers[number]
        time.sleep(after)
        try:
            rendezvous.meet(coordinator, processes, index, timeout_s)
        except ValueError as error:
            told[number] = str(error)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(len(callers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


def test_processes_meet_in_any_order_or_hear_why_not():
    assert gather((2, 3, 0), (1, 3, 0.1), (0, 3, 0.3)) == ["", "", ""]
    two = "two processes have the index 1 (SKYSENSE_PROCESS_INDEX); 3 are expected"
    assert gather((0, 3, 0), (1, 3, 0.1), (1, 3, 0.1)) == [two] * 3
    other = "process 1 expects 4 processes, process 0 expects 2 (SKYSENSE_PROCESSES)"
    assert gather((0, 2, 0), (1, 4, 0)) == [other] * 2
    [alone] = gather((1, 2, 0), timeout_s=0.5)
    assert "process 0 did not answer at localhost:" in alone and "of 2 processes 1 is known to be here" in alone


def test_a_stranger_at_the_door_is_not_counted():
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
    told: list[str] = []

    def wait() -> None:
        try:
            rendezvous.meet(f"localhost:{port}", 2, 0, 3)
        except ValueError as error:
            told.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    while True:
        try:
            stranger = socket.create_connection(("localhost", port), timeout=5)
            break
        except OSError:
            time.sleep(0.01)
    with stranger:
        stranger.sendall(b"GET / HTTP/1.1\n")
        thread.join()
    assert told and "1 of 2 processes came together within 3 s; missing: 1" in told[0], os.linesep.join(told)
