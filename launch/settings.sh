# Sourced by tpu.sh, gke.sh, slurm.sh and worker.sh: how they read settings, refuse, and print a command instead of
# running it.
# Plain bash 3.2, so that it also runs on the bash of macOS.

dry_run=${LAUNCH_DRY_RUN:-}
rest=()  # what follows --: the arguments of skysense_jax.train

refuse() { echo "$(basename "$0"): $*" >&2; exit 78; }

# read_settings "name zone ..." "spot ..." "env ..." ARGS...
# Values: --name VALUE or --name=VALUE, else the environment's LAUNCH_NAME, into $name (a dash becomes an underscore).
# Switches: --spot or LAUNCH_SPOT=1, into $spot ("" when off). Lists: --env may be repeated, into the array ${env[@]}.
read_settings() {
    local values=" $1 " switches=" $2 dry-run " lists=" $3 "
    local _name _variable  # underscores: a setting may be called name
    shift 3
    for _name in $values $switches; do
        _variable=LAUNCH_$(printf %s "$_name" | tr 'a-z-' 'A-Z_')
        printf -v "$(variable_of "$_name")" %s "${!_variable-}"
        case "$switches:${!_variable-}" in  # LAUNCH_KEEP=0 must not mean yes
            *" $_name "*:?*) [ "${!_variable}" = 1 ] || refuse "$_variable=${!_variable}: 1, or nothing for no" ;;
        esac
    done
    for _name in $lists; do unset "$(variable_of "$_name")"; done
    while [ $# -gt 0 ]; do
        [ "$1" = -- ] && { shift; rest=("$@"); return; }
        case $1 in --?*) ;; *) refuse "unexpected '$1'; the arguments of training come after --" ;; esac
        _name=${1%%=*}; _name=${_name#--}; _variable=$(variable_of "$_name")
        case "$switches" in *" $_name "*)
            [ "$1" = "--$_name" ] || refuse "--$_name takes no value"
            printf -v "$_variable" 1; shift; continue ;;
        esac
        case "$values$lists" in
            *" $_name "*) ;;
            *) refuse "unknown setting --$_name; known: $(echo $values $switches $lists)" ;;
        esac
        if [ "$1" = "--$_name" ]; then
            [ $# -gt 1 ] || refuse "--$_name needs a value"
            shift
        else
            set -- "${1#*=}" "${@:2}"
        fi
        case "$lists" in
            *" $_name "*) append "$_variable" "$1" ;;
            *) printf -v "$_variable" %s "$1" ;;
        esac
        shift
    done
}

variable_of() { printf %s "$1" | tr - _; }

append() {  # to the array named $1
    case $1 in
        env)
            case ${2%%=*} in
                [!A-Za-z_]* | *[!A-Za-z0-9_]* | '' | "$2")
                    refuse "--env=$2: NAME=VALUE, the name of letters, digits and _" ;;
            esac
            env+=("$2") ;;
        option) option+=("$2") ;;
        ssh_option) ssh_option+=("$2") ;;
    esac
}

need() {  # need NAME "what it is": refuses unless it was given
    local variable
    variable=$(variable_of "$1")
    [ -n "${!variable}" ] || refuse "--$1 (or LAUNCH_$(printf %s "$1" | tr 'a-z-' 'A-Z_')) is missing: $2"
}

need_number() {  # need_number NAME "what it is" LEAST
    local variable
    need "$1" "$2"
    variable=$(variable_of "$1")
    case ${!variable} in *[!0-9]* | 0?*) refuse "--$1=${!variable}: a whole number, $2" ;; esac
    [ "${!variable}" -ge "$3" ] || refuse "--$1=${!variable}: at least $3, $2"
}

need_training() {
    [ ${#rest[@]} -gt 0 ] || refuse "give the arguments of skysense_jax.train after --, as in:" \
        "-- --config configs/skysense_full.py --workdir DIR"
}

# The words as one line that any POSIX shell reads back as the same words.
quoted() {
    local word line= one="'" escaped="'\\''"
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=@%+,-]*) line+=" '${word//$one/$escaped}'" ;;
            *) line+=" $word" ;;
        esac
    done
    printf '%s\n' "${line# }"
}

act() {  # runs the command, or prints it with --dry-run
    if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}
