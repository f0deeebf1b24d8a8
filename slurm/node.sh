#!/bin/bash
# One node's part of a run: start the DeepSpeed launcher, keep signals from it, and leave no process behind.
#
#   node.sh MASTER_ADDRESS MASTER_PORT NODES RANKS_PER_NODE [COMMAND ARGUMENTS...]
#
# With the words of a command of cpt/cli.py, all ranks do that instead of a run; CPT_RUN_DIR is then OUT.partial.
# Runs in the repository or in a folder of `cpt init`, on every node at once, inside the container if there is one.  The nodes meet by TCP at
# MASTER_ADDRESS (that of node 0); no ssh, no host file shared between them.  With CPT_MEASURE (a step, or auto) the run is
# only measured at that step.

set -uo pipefail
umask 077
source slurm/lib.sh
load_settings
# a container brings its software
[[ "$CPT_CONTAINER" != none ]] || load_modules
enter_environment

if [[ -n "${CPT_MEASURE:-}" ]]; then
    CPT_RUN_ARGUMENTS+=(--measure --resume "$CPT_MEASURE")
fi
readonly ADDRESS=$1 PORT=$2 NODES=$3 RANKS=$4
shift 4
# in the repository its own files, elsewhere those of the installed package
PROGRAMS=cpt
[[ -f cpt/run.py ]] || PROGRAMS=$(python -c 'import cpt; print(cpt.__path__[0])') ||
    refuse "$PWD is not the repository, and the package gpt-oss-cpt is not installed in this environment."
PROGRAM=(
    "$PROGRAMS/run.py" --ds_config "$CPT_DS_CONFIG" --config "$CPT_CONFIG" --run_dir "$CPT_RUN_DIR" "${CPT_RUN_ARGUMENTS[@]}"
)
if (($#)); then PROGRAM=("$PROGRAMS/cli.py" "$@"); fi
readonly PROGRAM
readonly NODE=${SLURM_NODEID:-${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${PMI_RANK:-0}}}}

# print the GPU ids of this node: a job that shares its node may have 4,5 instead of 0,1
gpu_ids() {
    local ids=${CUDA_VISIBLE_DEVICES:-} commas
    commas=${ids//[!,]/}
    if [[ "$ids" =~ ^[0-9]+(,[0-9]+)*$ ]] && ((${#commas} == RANKS - 1)); then
        echo "$ids"
    else
        seq -s, 0 $((RANKS - 1))
    fi
}

# DeepSpeed's filter takes numbers only and overwrites CUDA_VISIBLE_DEVICES with them: UUIDs go to the ranks under a name of ours
if [[ "${CUDA_VISIBLE_DEVICES:-}" == GPU-* || "${CUDA_VISIBLE_DEVICES:-}" == MIG-* ]]; then
    export CPT_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES
fi

refuse_temporary_files() {
    refuse "no file can be written in ${TMPDIR:-/tmp} of $HOSTNAME. Free space there, or export TMPDIR in $CPT_ENV_FILE as a folder" \
        "that every node has; a container sees those in CPT_BINDS."
}

# DeepSpeed reads ranks from a host file and a filter.  It only counts the entries of other nodes, so any name works.
start_launcher() {
    local node include='' hosts='' ids
    for ((node = 0; node < NODES; node++)); do
        hosts+="node$node slots=1024"$'\n' # no limit: the filter selects the GPUs
        if ((node == NODE)); then ids=$(gpu_ids); else ids=$(seq -s, 0 $((RANKS - 1))); fi
        include+="${include:+@}node$node:$ids"
    done
    # without it DeepSpeed would begin a run of this node alone in the run directory
    printf '%s' "$hosts" >"$HOSTS" || refuse_temporary_files
    # its own process group: signals to this script's group do not reach it, and everything it starts can be found
    set -m
    deepspeed --hostfile "$HOSTS" --include "$include" --no_ssh --node_rank "$NODE" \
        --master_addr "$ADDRESS" --master_port "$PORT" \
        "${PROGRAM[@]}" </dev/null &
    LAUNCHER=$!
    set +m
}

# Copy what the run reads to a disk of this node.  What cannot be copied is read from shared storage.
stage_inputs() {
    [[ -n "$CPT_STAGE_DIR" && "${PROGRAM[0]}" == */run.py && -z "${CPT_MEASURE:-}" ]] || return 0
    local folder=$CPT_STAGE_DIR/gpt-oss-cpt word
    local -a settings=(--config "$CPT_CONFIG" --run_dir "$CPT_RUN_DIR")
    # copies that are not kept are this job's own: another job may end while this one reads
    if ((CPT_STAGE_KEEP)); then folder+=-uid-$UID; else folder+=-$JOB; fi
    for ((word = 0; word + 1 < ${#CPT_RUN_ARGUMENTS[@]}; word++)); do
        [[ "${CPT_RUN_ARGUMENTS[word]}" != --set ]] || settings+=(--set "${CPT_RUN_ARGUMENTS[word + 1]}")
    done
    say "copying to $folder"
    if CPT_STAGED=$(python -m cpt.cli stage "${settings[@]}" --to "$folder"); then
        export CPT_STAGED
    else
        unset CPT_STAGED
        say "nothing could be copied to $folder: this node reads from shared storage"
    fi
    ((CPT_STAGE_KEEP)) || STAGED_FOLDER=$folder
    wait_for_copies
}

# Wait until all nodes have copied: ranks that start earlier would wait for the others only as long as NCCL allows.
wait_for_copies() {
    local folder=$CPT_RUN_DIR/.copied-$JOB deadline=$((SECONDS + CPT_STAGE_SECONDS)) node missing
    ((NODES > 1)) && mkdir -p "$folder" && touch "$folder/${SLURM_RESTART_COUNT:-0}-$NODE" || return 0
    while :; do
        missing=
        for ((node = 0; node < NODES; node++)); do
            [[ -e "$folder/${SLURM_RESTART_COUNT:-0}-$node" ]] || missing+=" $node"
        done
        [[ -n "$missing" ]] || return 0
        ((SECONDS < deadline)) || { say "nodes$missing still copy after CPT_STAGE_SECONDS=$CPT_STAGE_SECONDS"; return 0; }
        sleep 1
    done
}

processes_left() {
    kill -0 -- -"$LAUNCHER" 2>/dev/null
}

# Wait until no process of the launcher's group is left, for at most the given seconds.
wait_until_gone() {
    local deadline=$((SECONDS + $1))
    while processes_left && ((SECONDS < deadline)); do sleep 0.5; done
    ! processes_left
}

finished() {
    if [[ "${PROGRAM[0]}" == */cli.py ]]; then
        [[ -e "${CPT_RUN_DIR%.partial}" && ! -d "$CPT_RUN_DIR" ]]
        return
    fi
    [[ -n "${CPT_MEASURE:-}" ]] || python -m cpt.cli status --run_dir "$CPT_RUN_DIR"
}

# The launcher was killed but its ranks were not: let them save through the STOP file, and continue in another start.
stop_orphans() {
    # a process that only measures ignores the STOP file, which would stop the run
    [[ -n "${CPT_MEASURE:-}" ]] || ask_to_stop "the launcher of node $NODE ended with $1 and left its ranks behind"
    if ! wait_until_gone "$CPT_SAVE_SECONDS"; then
        say "ranks still run after CPT_SAVE_SECONDS=$CPT_SAVE_SECONDS: killing them"
        return "$EXIT_INTERNAL"
    fi
    finished 2>/dev/null || return "$EXIT_REQUEUE"
}

# Print the exit code of this node's part, given the launcher's.
judge() {
    local code=$1 orphans=false
    processes_left && orphans=true
    if ((code == 0)) && { ((NODE == 0)) || $orphans; } && ! finished; then
        say "the launcher ended with 0, but the run is not finished"
        code=$EXIT_INTERNAL
    fi
    # 0: `deepspeed` also ends so when its child was killed; 129 to 192: it was killed.  Other codes are passed on by
    # launchers that have seen all their ranks end.
    if $orphans && { (($1 == 0 && code != 0)) || ((128 < code && code <= 192)); }; then
        stop_orphans "$1"
        return
    fi
    return "$code"
}

# Compile into a folder of this job, whose name nobody can guess and which nobody else can enter.
make_caches() {
    local name
    ((CPT_JOB_CACHES)) || return 0
    CACHES=$(mktemp -d -t cpt-caches-XXXXXXXXXX) || refuse "no folder for CPT_JOB_CACHES=1 can be made in ${TMPDIR:-/tmp}."
    for name in TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR TORCH_EXTENSIONS_DIR; do
        mkdir "$CACHES/$name" || refuse_temporary_files
        export "$name=$CACHES/$name"
    done
}

HOSTS=$(mktemp) || refuse_temporary_files
readonly HOSTS
STAGED_FOLDER=
CACHES=
# shellcheck disable=SC2317  # called by the trap
clean_up() {
    rm -f "$HOSTS"
    [[ -z "$STAGED_FOLDER" ]] || rm -rf "$STAGED_FOLDER"
    [[ -z "$CACHES" ]] || rm -rf "$CACHES"
}
trap clean_up EXIT
[[ -n "${CPT_MEASURE:-}" ]] || listen_for_signals TERM USR1 INT
make_caches
stage_inputs
start_launcher
wait_for "$LAUNCHER"
judge $?
code=$?
processes_left && kill -KILL -- -"$LAUNCHER"
exit "$code"
