"""Programs on PATH that do on this machine what gcloud, srun and scontrol do elsewhere, for tests/test_launch.py.

The commands meant for a host run here, with the host's folder as HOME, and so do the real worker.sh and setup.sh; only
the environment's python is a stand-in, which exits as told where it should train.
"""

import hashlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"

GCLOUD = r"""
import json, os, pathlib, shutil, signal, subprocess, sys
here, args = pathlib.Path(os.environ["FAKE"]), sys.argv[1:]
assert args[:3] == ["compute", "tpus", "queued-resources"], args
verb, rest = args[3], args[4:]
with open(here / "calls", "a") as file:
    file.write(json.dumps([verb, *rest]) + "\n")
homes = [here / "hosts" / n for n in "01"]

def wipe():
    for home in homes:
        pid = home / "skysense_run" / "pid"
        if pid.exists():
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)

if verb == "describe":  # the next state; one with a word after it stays until a host has answered that word
    states, seen = json.loads((here / "states").read_text()), (here / "answers")
    word = states[0].partition(" ")[2]
    if len(states) > 1 and (here / "asked").exists() and (not word or seen.exists() and word in seen.read_text()):
        states = states[1:]
        seen.unlink(missing_ok=True)
    (here / "asked").touch()
    (here / "states").write_text(json.dumps(states))
    state = states[0].split()[0]
    if state.isupper() and state != "NOT_FOUND":
        print(state)
    else:
        sys.exit(f"ERROR: {state}")
elif verb in ("create", "delete"):
    wipe()
elif verb == "scp":
    for home in homes:
        shutil.copy(rest[0], home / rest[1].partition(":")[2])
elif verb == "ssh":
    command = next(arg for arg in rest if arg.startswith("--command=")).partition("=")[2]
    chosen = homes if "--worker=all" in rest else homes[:1]
    started = [subprocess.Popen(["bash", "-c", command], env={**os.environ, "HOME": str(home)}, cwd=home,
                                stdout=subprocess.PIPE, text=True) for home in chosen]
    said = "".join(process.communicate()[0] for process in started)
    print(said, end="")
    with open(here / "answers", "a") as file:
        file.write(said)
    sys.exit(max(process.returncode for process in started))
"""

# The environment's python. Training takes the next code of FAKE/codes; "1/78": host 0 and host 1; "hold": stay until
# SIGTERM, then 75; "lost": take along the shell that would note the code.
PYTHON = r"""#!/bin/bash
if [ "$1 $2" != "-m skysense_jax.train" ]; then exec REAL -S "$@"; fi
me=${SLURM_PROCID:-$(basename "$HOME")}
job="processes=$SKYSENSE_PROCESSES at=$SKYSENSE_COORDINATOR index=$SKYSENSE_PROCESS_INDEX tpu=$TPU_TYPE"
echo "$me $job $*" >> "$FAKE/starts"
code=$(sed -n "$(grep -c "^$me " "$FAKE/starts")p" "$FAKE/codes")
case $me$code in 0*/*) code=${code%/*} ;; 1*/*) code=${code#*/} ;; esac
echo "the log of host $me ends with $code"
case $code in
    hold) trap 'echo "$me left" >> "$FAKE/left"; exit 75' TERM; while :; do sleep 0.05; done ;;
    lost) kill -KILL $PPID; exit 0 ;;
esac
exit "$code"
"""

# Two tasks one after the other; like srun, ends with the highest code.
SRUN = r"""#!/bin/bash
while [[ $1 == --* ]]; do shift; done
highest=0
for n in 0 1; do SLURM_PROCID=$n "$@"; code=$?; [ $code -le $highest ] || highest=$code; done
exit $highest
"""


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)


def clean_env():
    ours = ("LAUNCH_", "SKYSENSE_", "SLURM", "TPU_", "VENV")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def launch(name, args, env):
    return subprocess.run(
        [LAUNCH / name, *args], env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


class Cluster:
    """The programs in `folder`, and an environment that setup.sh finds ready. As a function it runs a launch script."""

    def __init__(self, folder):
        bin_ = folder / "bin"
        venv = folder / "venv"
        (venv / "bin").mkdir(parents=True)
        bin_.mkdir()
        for host in "01":
            (folder / "hosts" / host).mkdir(parents=True)
        script(bin_ / "gcloud", f"#!{sys.executable} -IS\n{GCLOUD}")
        script(bin_ / "srun", SRUN)
        script(bin_ / "scontrol", '#!/bin/bash\necho "$*" >> "$FAKE/scontrol"\n')
        tar = shlex.quote(shutil.which("tar"))
        script(bin_ / "tar", f'#!/bin/sh\n[ "$1" != -czf ] || echo >> "$FAKE/packed"\nexec {tar} "$@"\n')
        script(venv / "bin" / "python", PYTHON.replace("REAL", shlex.quote(sys.executable)))
        versions = "py311" if sys.version_info[:2] == (3, 11) else "py312"
        hashed = ("pyproject.toml", "setup.py", f"constraints-{versions}.txt")
        stamp = b"".join((ROOT / name).read_bytes() for name in hashed)
        for extra in ("tpu", "gpu"):
            (venv / f".installed-{extra}").write_text(hashlib.sha256(stamp).hexdigest() + "\n")
        self.env = {
            **clean_env(),
            "FAKE": str(folder),
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "VENV": str(venv),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PYTHON": str(venv / "bin" / "python"),
        }
        self.folder = folder

    def __call__(self, name, *args, states=(), codes=(), **more):
        """states: of the queued resource, one per question; "STATE word": stays until a host answered the word.
        codes: of the first, second, ... start of training, on every host.
        """
        (self.folder / "states").write_text(json.dumps(list(states)))
        if codes:
            (self.folder / "codes").write_text("".join(f"{code}\n" for code in codes))
        return launch(name, args, {**self.env, **more})

    def verbs(self):
        """What gcloud was asked to do, without the questions."""
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [call[0] for call in calls if call[0] in ("create", "scp", "delete")]

    def starts(self):
        """One line per start of training: the host, its settings and arguments."""
        return (self.folder / "starts").read_text().splitlines()

    def close(self):
        """End what still runs on the hosts."""
        for pid in self.folder.glob("hosts/*/skysense_run/pid"):
            try:
                os.killpg(int(pid.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass
