#!/usr/bin/env bash
# Pretraining on a GPU cluster under Slurm: one process per node with all its GPUs; the job goes back into the queue
# when it was preempted or reached its time limit (75, not counted) and after a failure (70, a crash; counted), and
# ends on 0, 65 and 78.
#   launch/slurm.sh submit SETTINGS [--dry-run] -- ARGUMENTS OF skysense_jax.train
#   launch/slurm.sh job    SETTINGS [--dry-run] -- ARGUMENTS     what the job itself runs; submit puts it there
# The checkout, the workdir and the data lie on a file system that all nodes share.
# Settings, as flags or as LAUNCH_NAME in the environment:
#   --name            of the job (skysense)
#   --nodes           number of nodes
#   --gpus-per-node   GPUs of each
#   --time            limit of one stay in the queue, as sbatch takes it: 24:00:00
#   --grace           seconds before the limit at which SIGTERM asks training to save and leave (300)
#   --logs            folder for the job's output and its count of failures
#   --max-failures    the job ends when this many failures are counted (5)
#   --env             NAME=VALUE for setup and training, repeatable; the environment of `submit` is passed on anyway
#   --option FLAG     handed to sbatch, repeatable: --option=--partition=..., --option=--account=...
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
[ "${1-}" != job ] || root=$PWD  # Slurm runs a copy of this file from its spool folder, in the folder submit named
. "$root/launch/settings.sh"
command=${1-}
case $command in submit | job) shift ;; *) refuse "submit or job?" ;; esac
read_settings "name nodes gpus-per-node time grace logs max-failures" "" "env option" "$@"
name=${name:-skysense} grace=${grace:-300} max_failures=${max_failures:-5}

need_number nodes "nodes of the job" 1
need_number gpus-per-node "GPUs of each node" 1
need_number grace "seconds" 1
need_number max-failures "failures" 1
need logs "a folder that all nodes share"
need_training

submit() {
    local passed=() pair
    for pair in ${env[@]+"${env[@]}"}; do passed+=(--env "$pair"); done
    need time "as in 24:00:00"
    act mkdir -p "$logs"
    act sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus_per_node" --exclusive \
        --time="$time" \
        --signal="TERM@$grace" --requeue --open-mode=append --output="$logs/%x-%j.log" --chdir="$root" \
        ${option[@]+"${option[@]}"} \
        "$root/launch/slurm.sh" job --nodes "$nodes" --gpus-per-node "$gpus_per_node" --logs "$logs" \
        --max-failures "$max_failures" \
        ${passed[@]+"${passed[@]}"} -- "${rest[@]}"
}

again() {  # again CODE: back into the queue, or out with the code
    act scontrol requeue "$SLURM_JOB_ID" || {
        echo "slurm.sh: the job could not be requeued; submit it again to go on" >&2; exit "$1"; }
}

job() {
    [ -n "${SLURM_JOB_ID-}" ] || refuse "job runs inside Slurm; submit puts it there"
    local count=$logs/failures-$SLURM_JOB_ID code=0 failures pair
    # Process 0 runs on the node that runs this script; two jobs on one node need two ports.
    local coordinator=${SLURMD_NODENAME:-$(hostname)}:$((12000 + SLURM_JOB_ID % 20000))
    for pair in ${env[@]+"${env[@]}"}; do act export "$pair"; done
    act launch/setup.sh gpu || exit  # here, so that not all nodes install at once into the checkout they share
    trap : TERM  # training answers the signal; this script waits for its exit code
    act srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus_per_node" --wait=300 \
        --kill-on-bad-exit=0 \
        launch/worker.sh --extra gpu --processes "$nodes" --coordinator "$coordinator" -- "${rest[@]}" || code=$?
    [ -z "$dry_run" ] || return 0
    case $code in
        0 | 65 | 78) echo "slurm.sh: training ended with $code" >&2; exit "$code" ;;
        75) echo "slurm.sh: training saved and left (75); requeued, not counted" >&2; again 75 ;;
        *)
            failures=$(($(cat "$count" 2> /dev/null || echo 0) + 1))
            echo "$failures" > "$count"
            echo "slurm.sh: training ended with $code, failure $failures of $max_failures" >&2
            [ "$failures" -lt "$max_failures" ] || exit "$code"
            again "$code" ;;
    esac
}

"$command"
