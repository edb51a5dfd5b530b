#!/usr/bin/env bash
# Pretraining on Cloud TPU: a queued resource of one or more slices, training on all its hosts, started again after
# preemptions.
#   launch/tpu.sh create|status|logs|delete  SETTINGS [--dry-run]
#   launch/tpu.sh run|watch                  SETTINGS [--dry-run] -- ARGUMENTS OF skysense_jax.train
# create  asks for the queued resource and returns      run     sends this checkout to all hosts, starts training
# status  its state, and what training does on each host logs    follows the log of the first host
# delete  gives everything back                          watch   all of it: creates, runs, starts again, deletes
# Settings, as flags or as LAUNCH_NAME in the environment (LAUNCH_ZONE=...):
#   --name --zone --project   of the queued resource
#   --accelerator-type        slice to ask for: v5litepod-256, v5p-128, v6e-256 ... (create, run, watch)
#   --runtime-version         image of the TPU VMs: v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e
#                             ... (create, watch)
#   --hosts                   hosts of one slice: its chips / 4; 1 where a v5e or v6e slice has at most 8 chips
#                             (run, watch)
#   --slices                  number of slices (1)
#   --spot                    may be preempted, costs less
#   --option FLAG             handed to `queued-resources create`, repeatable: --option=--service-account=...,
#                             --option=--reserved
#   --ssh-option FLAG         handed to `queued-resources ssh` and `scp`, repeatable: --ssh-option=--tunnel-through-iap
#   --env --prepare           as in launch/worker.sh
#   --poll                    seconds between two looks of watch (60; more for hundreds of hosts, each look asks
#                             them all)
#   --max-failures            watch gives up when this many failures are counted (5); preemptions are
#                             counted apart, without a limit
#   --keep                    watch leaves the queued resource standing when it ends
# watch may itself be stopped and started: it takes up the run it finds, and counts from 0 again. Exit codes of
# watch: 0 done; 65 and 78 as training said, not restarted; otherwise the code of the last failure (1 where there is
# none), after too many failures.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
. "$root/launch/settings.sh"
command=${1-}
case $command in
    create | run | status | logs | delete | watch) shift ;;
    *) refuse "create, run, status, logs, delete or watch?" ;;
esac
read_settings "name zone project accelerator-type runtime-version hosts slices poll max-failures prepare" "spot keep" \
    "env option ssh-option" "$@"
slices=${slices:-1} poll=${poll:-60} max_failures=${max_failures:-5}

need name "the queued resource"
need zone "where the TPU is"
need project "the Google Cloud project"
need_number slices "slices of the run" 1
need_number poll "seconds" 0
need_number max-failures "failures" 1
case $command in
    create | watch) need accelerator-type "as in v5litepod-256"; need runtime-version "as in v2-alpha-tpuv5-lite" ;;
esac
case $command in
    run | watch) need accelerator-type "as in v5litepod-256"; need_number hosts "hosts of one slice" 1; need_training ;;
esac

queued() {  # queued VERB [ARGUMENTS]: gcloud on this project's queued resources
    local verb=$1
    shift
    act gcloud compute tpus queued-resources "$verb" "$@" --project="$project" --zone="$zone" --quiet
}

on_hosts() {  # on_hosts HOSTS COMMAND: a shell command on all hosts or on host 0 of slice 0
    queued ssh "$name" --node="$1" --worker="$1" --command="$2" ${ssh_option[@]+"${ssh_option[@]}"}
}

create() {
    local nodes=(--node-id="$name")
    [ "$slices" -eq 1 ] || nodes=(--node-count="$slices" --node-prefix="$name")
    queued create "$name" "${nodes[@]}" --accelerator-type="$accelerator_type" --runtime-version="$runtime_version" \
        ${spot:+--spot} ${option[@]+"${option[@]}"}
}

delete() { queued delete "$name" --force; }

# On each host: ~/skysense_jax the checkout; ~/skysense_run/log, exit_code once training ended, and lock, held while
# it runs (a process number could belong to somebody else after a reboot, a lock cannot). Training outlives the
# connection that starts it.
stop_rest='flock -n lock true || { kill -TERM -- "-$(cat pid)"; flock -w 300 lock true; } || '
stop_rest+='{ kill -KILL -- "-$(cat pid)"; flock -w 60 lock true; }'
ask_host='mkdir -p ~/skysense_run && cd ~/skysense_run && '
ask_host+='if ! flock -n lock true; then state=running; elif [ -s exit_code ]; then
state=$(cat exit_code); elif [ -e pid ]; then state=lost; else state=none; fi && '
ask_host+='echo "skysense-host $(hostname) $state"'

archive=${XDG_CACHE_HOME:-$HOME/.cache}/skysense_jax/$name.tar.gz

pack() {  # once for a watch: a restart runs the code it began with, whatever happens to the checkout meanwhile
    act mkdir -p "$(dirname "$archive")"
    act tar -czf "$archive" -C "$root" --exclude=__pycache__ \
        pyproject.toml setup.py README.md LICENSE constraints-py311.txt constraints-py312.txt \
        configs launch skysense_jax
}

run() {
    local worker=(launch/worker.sh --extra tpu --processes $((hosts * slices))) pair
    local training='echo $$ > pid; trap : TERM; (cd ~/skysense_jax && exec "$@" 9>&-); echo $? > exit_code'
    # TPU_TYPE: core/hardware/xla_flags.py
    for pair in "TPU_TYPE=$accelerator_type" ${env[@]+"${env[@]}"}; do worker+=(--env "$pair"); done
    [ -z "$prepare" ] || worker+=(--prepare "$prepare")
    queued scp "$archive" "$name:skysense_jax.tar.gz" --node=all --worker=all ${ssh_option[@]+"${ssh_option[@]}"} &&
        on_hosts all "set -e
mkdir -p ~/skysense_jax ~/skysense_run && cd ~/skysense_run
$stop_rest
rm -rf ~/skysense_jax/configs ~/skysense_jax/launch ~/skysense_jax/skysense_jax
tar -xzf ~/skysense_jax.tar.gz -C ~/skysense_jax
rm -f exit_code
exec 9>lock && flock -n 9
setsid bash -c '$training' start $(quoted "${worker[@]}" -- "${rest[@]}") >> log 2>&1 < /dev/null &"
}

state() {  # of the queued resource; NONE where there is none; UNKNOWN, with gcloud's message, where it cannot be asked
    local out errors
    errors=$(mktemp)
    if out=$(queued describe "$name" --format='value(state.state)' 2> "$errors"); then
        printf '%s\n' "$out"
    elif grep -q NOT_FOUND "$errors"; then
        echo NONE
    else
        cat "$errors" >&2
        echo UNKNOWN
    fi
    rm -f "$errors"
}

# What all hosts together say: silent (not all answered), none, running, done, or the code by which the run ended,
# followed by "running" while some hosts have not noticed yet.
verdict() {
    local answers
    answers=$(on_hosts all "$ask_host" | tr -d '\r' | grep '^skysense-host ') || { echo silent; return; }
    awk -v expected=$((hosts * slices)) '
        $3 == "running" { running++ } $3 == "none" { none++ }
        $3 == "65" || $3 == "78" { stop = $3 } $3 == "75" { preempted++ }
        $3 == "lost" { $3 = 1 } $3 ~ /^[0-9]+$/ && $3 > 0 { failed = $3 }
        END {
            if (NR != expected) print "silent"
            else if (stop) print stop
            else if (preempted || failed) { code = preempted ? 75 : failed; print code (running ? " running" : "") }
            else print (running ? "running" : (none ? "none" : "done"))
        }' <<< "$answers"
}

preemptions=0 failures=0
tell() { echo "watch: $(date -u +%FT%TZ) $*; $preemptions preemptions, $failures failures" >&2; }

failed() {  # failed CODE WHAT: counts, and ends the watch when it was one too many
    failures=$((failures + 1))
    tell "$2"
    [ "$failures" -lt "$max_failures" ] || { tell "giving up (--max-failures=$max_failures)"; finish "$1"; }
}

finish() {  # finish CODE: the end of the watch; a resource nobody uses is given back
    [ -n "$keep" ] || delete || tell "could not delete $name: delete it by hand, it costs money"
    exit "$1"
}

start() {  # hosts that are being taken away do not count against the run
    if run; then tell "training $1"; elif [ "$(state)" = ACTIVE ]; then failed 1 "could not start training"; fi
}

watch() {
    local seen= last= known= noted= ended=0 silent=0 now
    pack
    while :; do
        last=$seen seen=$(state)
        [ "$seen" = "$last" ] || tell "$name is $seen"
        [ "$seen" = ACTIVE ] || ended=0 silent=0
        case $seen in
            UNKNOWN)
                [ -n "$known" ] || refuse "cannot ask for $name in $zone of $project; gcloud's message is above"
                tell "trying again" ;;
            NONE)
                noted=
                if create; then tell "asked for $name"; else failed 1 "could not ask for $name"; fi ;;
            SUSPENDED | FAILED)
                if [ "$seen" = FAILED ]; then
                    failed 1 "the request failed"
                elif [ -z "$noted" ]; then
                    preemptions=$((preemptions + 1)) noted=1
                fi
                tell "deleting $name to ask again"
                delete || failed 1 "could not delete $name" ;;
            ACTIVE)
                now=$(verdict)
                case $now in silent) silent=$((silent + 1)) ;; *) silent=0 ;; esac
                case $now in
                    running) noted= ended=0 ;;
                    silent)
                        tell "not all hosts answered ($silent of 5)"
                        if [ "$silent" -ge 5 ]; then
                            silent=0
                            failed 1 "hosts stay silent; deleting $name to ask again"
                            delete || failed 1 "could not delete $name"
                        fi ;;
                    none) start started ;;
                    done) tell "training is done"; finish 0 ;;
                    65 | 78)
                        tell "training ended with $now: it would end so again, not restarted"
                        last="if [ \"\$(cat exit_code)\" = $now ]; then tail -n 40 log; fi"
                        on_hosts all "cd ~/skysense_run && $last" || true
                        finish "$now" ;;
                    *)  # Looked at twice, as a preempted slice takes the others down before it shows as SUSPENDED;
                        # and hosts that still run get a while to end with a code of their own.
                        ended=$((ended + 1))
                        if [ "$ended" -ge 6 ] || { [ "$ended" -ge 2 ] && [ "$now" = "${now% running}" ]; }; then
                            ended=0 now=${now% running}
                            if [ "$now" != 75 ]; then
                                failed "$now" "training ended with $now"
                            elif [ -z "$noted" ]; then
                                preemptions=$((preemptions + 1)) noted=1
                                tell "training saved and left (75)"
                            fi
                            start "started again"
                        fi ;;
                esac ;;
        esac
        [ "$seen" = UNKNOWN ] || known=1
        sleep "$poll"
    done
}

case $command in
    create) create ;;
    run)
        pack
        run ;;
    logs) on_hosts 0 'tail -n 50 -f ~/skysense_run/log' ;;
    delete) delete ;;
    status)
        if [ -n "$dry_run" ]; then
            queued describe "$name" --format='value(state.state)'
            on_hosts all "$ask_host"
        else
            seen=$(state)
            echo "$name: $seen"
            [ "$seen" != ACTIVE ] || on_hosts all "$ask_host"
        fi ;;
    watch)
        if [ -n "$dry_run" ]; then  # one round without trouble
            queued describe "$name" --format='value(state.state)'
            create
            pack
            run
            on_hosts all "$ask_host"
            [ -n "$keep" ] || delete
        else
            watch
        fi ;;
esac
