"""The launch scripts: what they would run, and what they do when a pod is preempted, fails or ends."""

import ast
import pathlib
import re
import shutil
import subprocess

import pytest

from tests.helpers.fake_cluster import LAUNCH, ROOT, Cluster, clean_env, launch
from tests.helpers.launch_commands import GKE, TRAIN, dry

GOLDEN = pathlib.Path(__file__).parent / "golden_launch"
QUOTED = "--config configs/skysense_full.py --workdir 'gs://bucket/a run'\n"  # the same words for a shell
TOLD = "-m skysense_jax.train --config configs/skysense_full.py --workdir gs://bucket/a run"  # as training got them
TPU = "--name pod --zone zone-a --project mine --accelerator-type v5litepod-8 --runtime-version image --hosts 2".split()
SLURM = "--nodes 2 --gpus-per-node 8 --logs LOGS".split()


@pytest.fixture
def fake(tmp_path):
    missing = [name for name in ("flock", "setsid") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (util-linux), as on the TPU VMs")
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.close()


def refused(name, *args, **env):
    done = launch(name, args, {**clean_env(), **env})
    assert done.returncode == 78 and not done.stdout, (done.returncode, done.stdout)
    return done.stderr


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_bash_and_say_what_they_are(path):
    subprocess.run(["bash", "-n", path], check=True)
    lines = path.read_text().splitlines()
    assert (lines[1] if lines[0].startswith("#!") else lines[0]).startswith("# ")


def test_worker_prints_what_it_would_run():
    tail = f"exec .venv/bin/python -m skysense_jax.train {QUOTED}"
    assert dry("worker.sh", "--extra", "tpu", "--processes", "16", "--dry-run", *TRAIN) == (
        f"cd ROOT\nlaunch/setup.sh tpu\nexport SKYSENSE_PROCESSES=16\n{tail}"
    )
    assert dry(
        "worker.sh",
        "--extra=gpu",
        "--processes=2",
        "--coordinator=n0:1234",
        "--env",
        "A=it's",
        "--prepare",
        "date -u",
        "--dry-run",
        *TRAIN,
        SLURM_PROCID="1",
    ) == (
        "export 'A=it'\\''s'\ncd ROOT\nbash -c 'date -u'\nlaunch/setup.sh gpu\nexport SKYSENSE_PROCESSES=2\n"
        f"export SKYSENSE_COORDINATOR=n0:1234 SKYSENSE_PROCESS_INDEX=1\n{tail}"
    )


def test_settings_come_from_the_environment_too():
    flags = dry("worker.sh", "--extra", "cpu", "--processes", "1", "--dry-run", *TRAIN)
    assert flags == dry("worker.sh", *TRAIN, LAUNCH_EXTRA="cpu", LAUNCH_PROCESSES="1", LAUNCH_DRY_RUN="1")


def test_tpu_prints_a_whole_round_of_watch():
    text = dry(
        "tpu.sh",
        "watch",
        *TPU,
        "--slices",
        "2",
        "--spot",
        "--option=--service-account=robot",
        "--env",
        "A=1",
        "--ssh-option=--tunnel-through-iap",
        "--dry-run",
        *TRAIN,
    )
    assert text == (GOLDEN / "tpu_watch.txt").read_text()


def test_a_printed_command_is_the_command(fake):
    """The shell gives gcloud the same words as the script does."""
    args = ["create", *TPU, "--slices", "2", '--option=--description=it\'s a "pod"']
    assert fake("tpu.sh", *args).returncode == 0
    printed = fake("tpu.sh", *args, "--dry-run")
    subprocess.run(["bash", "-c", printed.stdout], env=fake.env, check=True)
    first, second = (fake.folder / "calls").read_text().splitlines()
    assert first == second and 'it\'s a \\"pod\\"' in first and "--node-count=2" in first


def test_slurm_prints_the_job_and_the_step():
    submit = ["submit", *SLURM, "--time", "24:00:00", "--env", "A=1", "--option=--partition=big", "--dry-run", *TRAIN]
    assert dry("slurm.sh", *submit) == (
        "mkdir -p LOGS\nsbatch --job-name=skysense --nodes=2 --ntasks-per-node=1 --gpus-per-node=8 --exclusive "
        "--time=24:00:00 --signal=TERM@300 --requeue --open-mode=append --output=LOGS/%x-%j.log --chdir=ROOT "
        "--partition=big ROOT/launch/slurm.sh job --nodes 2 --gpus-per-node 8 --logs LOGS --max-failures 5 "
        f"--env A=1 -- {QUOTED}"
    )
    job = ["job", *SLURM, "--env", "A=1", "--dry-run", *TRAIN]
    assert dry("slurm.sh", *job, SLURM_JOB_ID="30007", SLURMD_NODENAME="n0") == (
        "export A=1\nlaunch/setup.sh gpu\n"
        "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --gpus-per-node=8 --wait=300 --kill-on-bad-exit=0 "
        f"launch/worker.sh --extra gpu --processes 2 --coordinator n0:22007 -- {QUOTED}"
    )


@pytest.mark.parametrize(
    "name, args, text",
    [
        ("worker.sh", ["--processes", "2", *TRAIN], "--extra (or LAUNCH_EXTRA) is missing"),
        ("worker.sh", ["--extra", "tpu", *TRAIN], "--processes (or LAUNCH_PROCESSES) is missing"),
        ("worker.sh", ["--extra", "tpu", "--processes", "two", *TRAIN], "--processes=two: a whole number"),
        ("worker.sh", ["--extra", "tpu", "--processes", "0", *TRAIN], "at least 1"),
        ("worker.sh", ["--extra", "tpu", "--processes", "08", *TRAIN], "--processes=08: a whole number"),
        ("worker.sh", ["--extra", "tpu", "--processes", "2"], "arguments of skysense_jax.train after --"),
        ("worker.sh", ["--extra", "gpu", "--processes", "2", *TRAIN], "--coordinator is missing"),
        ("worker.sh", ["--extra", "gpu", "--processes", "2", "--coordinator", "host", *TRAIN], "HOST:PORT"),
        (
            "worker.sh",
            ["--extra", "gpu", "--processes", "2", "--coordinator", "h:1", *TRAIN],
            "--index (or LAUNCH_INDEX)",
        ),
        (
            "worker.sh",
            ["--extra", "gpu", "--processes", "2", "--coordinator", "h:1", "--index", "2", *TRAIN],
            "are 0 to 1",
        ),
        ("worker.sh", ["--extra", "tpu", "--processes", "2", "--env", "A", *TRAIN], "--env=A: NAME=VALUE"),
        ("worker.sh", ["--extra", "tpu", "--processes", "2", "--env", "A-B=1", *TRAIN], "--env=A-B=1: NAME=VALUE"),
        ("worker.sh", ["train"], "unexpected 'train'"),
        ("tpu.sh", [], "create, run, status, logs, delete or watch?"),
        ("tpu.sh", ["create", "--zonee", "z"], "unknown setting --zonee; known: name zone"),
        ("tpu.sh", ["create", "--spot=1"], "--spot takes no value"),
        ("tpu.sh", ["create", "--zone"], "--zone needs a value"),
        ("tpu.sh", ["status", "--name", "a", "--zone", "b"], "--project (or LAUNCH_PROJECT) is missing"),
        ("tpu.sh", ["watch", *TPU[:-2], *TRAIN], "--hosts (or LAUNCH_HOSTS) is missing"),
        ("tpu.sh", ["watch", *TPU, "--env", "1A=b", *TRAIN], "--env=1A=b: NAME=VALUE"),
        ("gke.sh", ["create", *GKE[:-2], *TRAIN], "--chips (or LAUNCH_CHIPS) is missing"),
        ("gke.sh", ["create", *GKE, "--env", "=b", *TRAIN], "--env==b: NAME=VALUE"),
        ("gke.sh", ["create", *GKE, "--name", "Run_1", *TRAIN], "--name=Run_1: lower case"),
        ("gke.sh", ["create", *GKE, "--image", 'a" b', *TRAIN], '--image=a" b: letters'),
        ("gke.sh", ["create", *GKE, "--", "two\nlines"], "a line break or tab in an argument"),
        ("slurm.sh", ["submit", *SLURM, *TRAIN], "--time (or LAUNCH_TIME) is missing"),
        ("slurm.sh", ["submit", *SLURM, "--time", "1", "--env", "A", *TRAIN], "--env=A: NAME=VALUE"),
        ("slurm.sh", ["job", *SLURM, *TRAIN], "job runs inside Slurm"),
    ],
)
def test_bad_settings_are_refused_with_78(name, args, text):
    assert text in refused(name, *args)


@pytest.mark.parametrize("variable, value", [("LAUNCH_KEEP", "0"), ("LAUNCH_SPOT", "false"), ("LAUNCH_DRY_RUN", "no")])
def test_a_switch_in_the_environment_is_1_or_nothing(variable, value):
    args = ["watch", *TPU, "--dry-run", *TRAIN]
    assert f"{variable}={value}: 1, or nothing for no" in refused("tpu.sh", *args, **{variable: value})
    assert dry("tpu.sh", *args, **{variable: ""}) == dry("tpu.sh", *args)


def test_the_codes_are_those_of_training():
    said = ast.get_docstring(ast.parse((ROOT / "skysense_jax" / "train.py").read_text())).partition("Exit codes: ")[2]
    page = (ROOT / "docs" / "launch.md").read_text()
    codes = {"0", "65", "70", "74", "75", "78"}
    assert codes == set(re.findall(r"\b\d+(?= )", said)) == set(re.findall(r"^\| (\d+) \|", page, re.M))


def test_watch_asks_again_after_a_preemption(fake):
    done = fake(
        "tpu.sh",
        "watch",
        *TPU,
        "--poll",
        "0",
        *TRAIN,
        codes=["hold", 0],
        states=["NOT_FOUND", "PROVISIONING", "ACTIVE running", "SUSPENDING", "SUSPENDED", "NOT_FOUND", "ACTIVE"],
    )
    assert done.returncode == 0, done.stderr
    assert fake.verbs() == ["create", "scp", "delete", "create", "scp", "delete"]
    assert "training is done; 1 preemptions, 0 failures" in done.stderr
    assert (fake.folder / "packed").read_text() == "\n"  # both starts ran the code of the first
    assert sorted(fake.starts()) == [f"{host} processes=2 at= index= tpu=v5litepod-8 {TOLD}" for host in (0, 0, 1, 1)]


def test_watch_counts_preemptions_and_failures_apart(fake):
    done = fake(
        "tpu.sh",
        "watch",
        *TPU,
        "--poll",
        "0",
        "--keep",
        *TRAIN,
        codes=[70, "75/134", "lost", 0],
        states=["FAILED", "NOT_FOUND", "ACTIVE"],
    )
    assert done.returncode == 0, done.stderr
    assert fake.verbs() == ["delete", "create", "scp", "scp", "scp", "scp"]  # restarted on the same hosts, and kept
    assert "training is done; 1 preemptions, 3 failures" in done.stderr


@pytest.mark.parametrize("codes, code", [("65", 65), ("134/78", 78)])
def test_watch_does_not_restart_what_would_end_the_same_way(fake, codes, code):
    done = fake("tpu.sh", "watch", *TPU, "--poll", "0", *TRAIN, codes=[codes], states=["NOT_FOUND", "ACTIVE"])
    assert done.returncode == code
    assert fake.verbs() == ["create", "scp", "delete"]
    assert f"the log of host 1 ends with {code}" in done.stdout
    assert f"training ended with {code}" in done.stderr


def test_watch_gives_up_after_the_stated_number_of_failures(fake):
    done = fake(
        "tpu.sh",
        "watch",
        *TPU,
        "--poll",
        "0",
        "--max-failures",
        "2",
        *TRAIN,
        codes=[75, 70, 70, 0],
        states=["NOT_FOUND", "ACTIVE"],
    )
    assert done.returncode == 70
    assert fake.verbs() == ["create", "scp", "scp", "scp", "delete"]
    assert "giving up (--max-failures=2); 1 preemptions, 2 failures" in done.stderr


def test_watch_gives_up_on_hosts_that_do_not_answer(fake):
    done = fake("tpu.sh", "watch", *TPU[:-1], "3", "--poll", "0", "--max-failures", "1", *TRAIN, states=["ACTIVE"])
    assert done.returncode == 1
    assert "not all hosts answered (5 of 5)" in done.stderr and fake.verbs() == ["delete"]


def test_watch_needs_a_first_answer(fake):
    done = fake("tpu.sh", "watch", *TPU, "--poll", "0", *TRAIN, states=["denied"])
    assert done.returncode == 78
    assert "ERROR: denied" in done.stderr and "cannot ask for pod in zone-a of mine" in done.stderr


def test_watch_takes_up_a_run_it_finds(fake):
    assert fake("tpu.sh", "run", *TPU, *TRAIN, codes=["hold"]).returncode == 0
    done = fake(
        "tpu.sh",
        "watch",
        *TPU,
        "--poll",
        "0",
        "--keep",
        *TRAIN,
        codes=["hold", 0],
        states=["ACTIVE running", "fault", "SUSPENDED", "NOT_FOUND", "ACTIVE"],
    )
    assert done.returncode == 0, done.stderr
    assert fake.verbs() == ["scp", "delete", "create", "scp"]
    assert "trying again; 0 preemptions, 0 failures" in done.stderr


def test_run_stops_what_still_runs(fake):
    for _ in range(2):
        done = fake("tpu.sh", "run", *TPU, *TRAIN, codes=["hold", "hold"])
        assert done.returncode == 0, done.stderr
        status = fake("tpu.sh", "status", *TPU[:6], states=["ACTIVE"])
        assert [line.split()[-1] for line in status.stdout.splitlines()] == ["ACTIVE", "running", "running"]
    assert sorted((fake.folder / "left").read_text().split()) == ["0", "1", "left", "left"]


@pytest.mark.parametrize(
    "codes, ends, requeued",
    [
        ([0], [0], 0),
        ([65], [65], 0),
        ([78], [78], 0),
        ([75, 75, 75], [0, 0, 0], 3),
        ([70, 74], [0, 74], 1),
        ([75, 134, 1], [0, 0, 1], 2),
    ],
)
def test_slurm_requeues_by_exit_code(fake, codes, ends, requeued):
    args = ["job", "--nodes", "2", "--gpus-per-node", "8", "--logs", str(fake.folder), "--max-failures", "2", *TRAIN]
    for end in ends:
        done = fake("slurm.sh", *args, codes=codes, SLURM_JOB_ID="7", SLURMD_NODENAME="n0")
        assert done.returncode == end, done.stderr
    calls = fake.folder / "scontrol"
    assert (calls.read_text().splitlines() if calls.exists() else []) == ["requeue 7"] * requeued
    assert fake.starts()[:2] == [f"{n} processes=2 at=n0:12007 index={n} tpu= {TOLD}" for n in (0, 1)]
