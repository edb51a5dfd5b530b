#!/usr/bin/env bash
# Pretraining on TPU node pools of a GKE cluster, as a JobSet (launch/jobset.yaml) that restarts by exit codes:
# 75 and lost nodes without counting, 65 and 78 never, anything else (70, a crash) counted against --max-restarts.
#   launch/gke.sh create SETTINGS [--dry-run] -- ARGUMENTS OF skysense_jax.train
#   launch/gke.sh status|logs|delete --name NAME [--dry-run]
# kubectl's current context is the cluster.
# Settings, as flags or as LAUNCH_NAME in the environment:
#   --name             of the JobSet: lower case letters, digits and dashes, at most 40
#   --image            container image whose working directory is this checkout (docs/launch.md has its four lines)
#   --accelerator      node label cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice,
#                      tpu-v5p-slice, tpu-v6e-slice, tpu7x
#   --topology         node label cloud.google.com/gke-tpu-topology: 16x16, 4x4x4 ...
#   --hosts            hosts of one slice    --chips    TPU chips of one host    --slices    number of slices (1)
#   --max-restarts     failures that are restarted (5)
#   --service-account  Kubernetes service account with access to the bucket (default)
#   --env --prepare    as in launch/worker.sh
#   --option FLAG      handed to kubectl, repeatable: --option=--namespace=...
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/settings.sh"
command=${1-}
case $command in create | status | logs | delete) shift ;; *) refuse "create, status, logs or delete?" ;; esac
settings="name image accelerator topology hosts chips slices max-restarts service-account prepare"
read_settings "$settings" "" "env option" "$@"
slices=${slices:-1} max_restarts=${max_restarts:-5} service_account=${service_account:-default}

need name "the JobSet"
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ && ${#name} -le 40 ]] ||
    refuse "--name=$name: lower case letters, digits and dashes, at most 40 (Kubernetes makes host names of it)"

kube() { act kubectl ${option[@]+"${option[@]}"} "$@"; }

plain() {  # refuses a value that would not be one plain word in the manifest
    case $2 in *[!A-Za-z0-9_./:@-]* | -* | @* | :*) refuse "--$1=$2: letters, digits and _ . / : @ - only" ;; esac
}

json() {  # the words as elements of a list in double quotes, which YAML reads as JSON does
    local word list= backslash='\'
    for word in "$@"; do
        case $word in *$'\n'* | *$'\t'*) refuse "a line break or tab in an argument: $word" ;; esac
        word=${word//"$backslash"/$backslash$backslash}
        word=${word//'"'/$backslash'"'}
        list+=", \"${word//'$('/'$$('}\""  # Kubernetes itself would fill in $(NAME)
    done
    printf %s "${list#, }"
}

manifest() {
    local arguments=(--extra tpu --processes $((hosts * slices))) pair text list
    # TPU_TYPE: core/hardware/xla_flags.py
    for pair in "TPU_TYPE=$accelerator" ${env[@]+"${env[@]}"}; do arguments+=(--env "$pair"); done
    [ -z "$prepare" ] || arguments+=(--prepare "$prepare")
    shopt -u patsub_replacement 2> /dev/null || true  # bash 5.2: an & in a value is an &
    text=$(cat "$root/launch/jobset.yaml")
    text=${text//@NAME@/$name}
    text=${text//@IMAGE@/$image}
    text=${text//@ACCELERATOR@/$accelerator}
    text=${text//@TOPOLOGY@/$topology}
    text=${text//@HOSTS@/$hosts}
    text=${text//@CHIPS@/$chips}
    text=${text//@SLICES@/$slices}
    text=${text//@MAX_RESTARTS@/$max_restarts}
    text=${text//@SERVICE_ACCOUNT@/$service_account}
    list=$(json "${arguments[@]}" -- "${rest[@]}") || exit
    printf '%s\n' "${text//@ARGS@/$list}"
}

case $command in
    create)
        need image "the container image"
        need accelerator "as in tpu-v5-lite-podslice"
        need topology "as in 16x16"
        need_number hosts "hosts of one slice" 1
        need_number chips "TPU chips of one host" 1
        need_number slices "slices of the run" 1
        need_number max-restarts "failures that are restarted" 0
        need_training
        for setting in image accelerator topology service-account; do
            variable=$(variable_of "$setting")
            plain "$setting" "${!variable}"
        done
        filled=$(manifest)
        if [ -n "$dry_run" ]; then
            printf "%s <<'END'\n%s\nEND\n" "$(kube apply -f -)" "$filled"
        else
            kube apply -f - <<< "$filled"
        fi ;;
    status)
        kube get jobset "$name" -o wide
        kube get pods -l "jobset.sigs.k8s.io/jobset-name=$name" -o wide ;;
    logs)
        first="jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
        kube logs -f -l "jobset.sigs.k8s.io/jobset-name=$name,$first" --tail=50 ;;
    delete) kube delete jobset "$name" ;;
esac
