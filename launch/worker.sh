#!/usr/bin/env bash
# What every host of a run executes, whoever starts it (tpu.sh, gke.sh, slurm.sh or you): installs this checkout,
# says which process of how many this host is, and becomes the training process, so that signals and exit codes pass
# through.
#   launch/worker.sh --extra tpu|gpu|cpu --processes N [SETTINGS] [--dry-run] -- ARGUMENTS OF skysense_jax.train
# Settings, as flags or as LAUNCH_NAME in the environment:
#   --extra        what jax is installed for: tpu, gpu or cpu
#   --processes    hosts of the whole run, one process each (SKYSENSE_PROCESSES); 1 for a single host.
#                  Never guessed: with a
#                  wrong number the run stops with both numbers instead of training many times over
#   --coordinator  HOST:PORT of process 0 (SKYSENSE_COORDINATOR). Not on TPU, where jax finds the hosts by itself
#   --index        this host's number, 0 .. processes-1 (SKYSENSE_PROCESS_INDEX); under Slurm, SLURM_PROCID
#   --env          NAME=VALUE for setup and training, repeatable: JAX_COMPILATION_CACHE_DIR, PYTHON and
#                  VENV (launch/setup.sh), ...
#   --prepare      a shell command run before the installation, for what an image lacks (a newer Python)
# Exit codes: those of training (docs/launch.md); 78 for a bad setting; 1 where preparing or installing failed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/settings.sh"
read_settings "extra processes coordinator index prepare" "" "env" "$@"

need extra "tpu, gpu or cpu"
case $extra in tpu | gpu | cpu) ;; *) refuse "--extra=$extra: tpu, gpu or cpu" ;; esac
need_number processes "how many hosts the run has" 1
need_training
[ -n "$index" ] || index=${SLURM_PROCID-}
if [ -n "$coordinator" ]; then
    case $coordinator in ?*:[0-9]*) ;; *) refuse "--coordinator=$coordinator: HOST:PORT of process 0" ;; esac
    need_number index "this host's number" 0
    [ "$index" -lt "$processes" ] || refuse "--index=$index: the $processes processes are 0 to $((processes - 1))"
elif [ "$processes" -gt 1 ] && [ "$extra" != tpu ]; then
    refuse "--coordinator is missing: only on TPU does jax find the $processes processes by itself"
fi
for pair in ${env[@]+"${env[@]}"}; do
    act export "$pair"
done

act cd "$root"
[ -z "$prepare" ] || act bash -c "$prepare" || {
    echo "worker.sh: --prepare failed with code $?: $prepare" >&2; exit 1; }
if [ "$extra" = cpu ]; then act launch/setup.sh; else act launch/setup.sh "$extra"; fi
act export SKYSENSE_PROCESSES="$processes"
if [ -n "$coordinator" ]; then
    act export SKYSENSE_COORDINATOR="$coordinator" SKYSENSE_PROCESS_INDEX="$index"
fi
act exec "${VENV:-.venv}/bin/python" -m skysense_jax.train "${rest[@]}"
