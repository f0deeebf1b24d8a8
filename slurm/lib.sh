# shellcheck shell=bash disable=SC2034  # sourced: others use what is set here
# Functions that the job templates share.  They run in the repository and source this file.
#
#   train.sbatch, pbs/train.pbs, age/train.sh    one job: starts node.sh on every node, waits, decides what comes next
#     node.sh                                    one node: starts `deepspeed`, leaves no process behind
#   offline.sbatch                               the same for a command of cpt/cli.py
#   prepare_data.sbatch                          a data job; starts ray_node.sh on every node with CPT_DATA_ENGINE=ray
#   failures.sh                                  whether a job that failed is started again
#   resubmit.sh                                  what PBS and AGE jobs know about themselves
#
# Decisions
#   Nobody signals a launcher: SIGTERM to `deepspeed` orphans its ranks.  A signal to a template or to node.sh becomes
#   the file <run_dir>/STOP, which makes all ranks save the same step and exit with 75.
#   Exit code 0 alone proves nothing: `deepspeed` ends with 0 when its child was killed.  A run is done when its newest
#   manifest holds the planned last step.

CARRIED=()      # words that give other nodes the environment of this one
JOB_END=        # when the scheduler ends the job, in seconds since 1970; empty: unknown, or cpt knows it from Slurm
FIRST_JOB=      # the job that a person has submitted, of which this one is another start; empty: cpt knows it from Slurm
NODE_COMMAND=() # words that node.sh gives to cpt/cli.py; none: it starts a run
readonly EXIT_INTERNAL=70 EXIT_HUNG=71 EXIT_REQUEUE=75 EXIT_CONFIG=78
source slurm/failures.sh

say() {
    printf '%(%H:%M:%S)T %s: %s\n' -1 "${SLURMD_NODENAME:-${HOSTNAME:-node}}" "$*" >&2
}

refuse() {
    say "$*"
    exit "$EXIT_CONFIG"
}

# Read the settings file, check it, and set the container prefix.
load_settings() {
    local file=${CPT_ENV:-slurm/env.sh}
    CPT_ENV_FILE=$file
    [[ -r "$file" ]] || refuse "$file is not there. Run  cp slurm/env.example.sh slurm/env.sh  and edit it."
    CPT_RUN_ARGUMENTS=() CPT_VLLM_ARGUMENTS=()
    # shellcheck source=slurm/env.example.sh
    source "$file"
    : "${CPT_MODULES:=}" "${CPT_CONTAINER:=none}" "${CPT_VENV:=.venv}" "${CPT_IMAGE:=}" "${CPT_BINDS:=}"
    : "${CPT_MODULE_PATHS:=}" "${CPT_RANKS_PER_NODE:=}" "${CPT_MASTER_INTERFACE:=}" "${CPT_SUBMIT:=qsub}" "${CPT_MPIRUN:=}"
    : "${CPT_STOP_AFTER_SECONDS:=}" "${CPT_STOP_MARGIN_SECONDS:=600}" "${CPT_KEEP_RESOURCES=filesystems}"
    : "${CPT_KEEP_VARIABLES=RTYPE USE_SSH}" "${CPT_MAX_RESTARTS:=20}" "${CPT_RESTART_ON_FAILURE:=0}" "${CPT_SAVE_SECONDS:=600}"
    : "${CPT_STAGE_DIR:=}" "${CPT_STAGE_KEEP:=0}" "${CPT_STAGE_SECONDS:=7200}" "${CPT_JOB_CACHES:=0}"
    : "${CPT_DATA_ENGINE:=local}"
    : "${CPT_SUITE:=configs/suites/gpt-oss.yaml}" "${CPT_VLLM:=vllm}" "${CPT_VLLM_START_SECONDS:=1800}"
    : "${CPT_VLLM_CONTEXT:=40960}" "${CPT_LM_EVAL:=lm_eval}" "${CPT_LIGHTEVAL:=lighteval}"
    local name
    for name in CPT_RUN_DIR CPT_CONFIG CPT_DS_CONFIG; do
        [[ -n "${!name:-}" ]] || refuse "$file: $name is empty. slurm/env.example.sh says what it is."
    done
    for name in CPT_MAX_RESTARTS CPT_RESTART_ON_FAILURE CPT_SAVE_SECONDS CPT_STOP_MARGIN_SECONDS CPT_STOP_AFTER_SECONDS \
        CPT_STAGE_KEEP CPT_STAGE_SECONDS CPT_JOB_CACHES CPT_VLLM_START_SECONDS CPT_VLLM_CONTEXT; do
        [[ "$name" == CPT_STOP_AFTER_SECONDS && -z "${!name}" || "${!name}" =~ ^[0-9]+$ ]] || refuse "$file: $name is '${!name}', must be a whole number."
    done
    case $CPT_CONTAINER in
        none) [[ -x "$CPT_VENV/bin/python" ]] || refuse "$file: CPT_VENV=$CPT_VENV has no bin/python. In a clone, make install makes .venv." \
            "Set it to the environment that gpt-oss-cpt is installed in." ;;
        apptainer | singularity | pyxis) [[ -n "$CPT_IMAGE" ]] || refuse "$file: CPT_CONTAINER=$CPT_CONTAINER needs CPT_IMAGE." ;;
        *) refuse "$file: CPT_CONTAINER is '$CPT_CONTAINER', must be none, apptainer, singularity or pyxis." ;;
    esac
    # the first node has found no folder to give to the container
    [[ -z "${CPT_STAGE_DROPPED:-}" ]] || CPT_STAGE_DIR=
    STOP_FILE=$CPT_RUN_DIR/STOP
}

# Load the modules of the settings.  Batch shells of PBS and AGE, and the shells that mpirun starts, have no `module` yet.
load_modules() {
    [[ -n "$CPT_MODULES" ]] || return 0
    local file folder unset_is_error=false
    [[ $- != *u* ]] || unset_is_error=true
    set +u # module systems read variables that are not set
    for file in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh /etc/profile.d/z00_lmod.sh "${MODULESHOME:-}/init/bash" \
        "${LMOD_PKG:-}/init/bash" /usr/share/lmod/lmod/init/bash /usr/share/Modules/init/bash; do
        [[ "$(type -t module)" != function ]] || break
        # shellcheck disable=SC1090  # one of the site's
        [[ ! -r "$file" ]] || source "$file"
    done
    [[ "$(type -t module)" == function ]] ||
        refuse "CPT_MODULES is '$CPT_MODULES', but $HOSTNAME has no module command, neither in this shell nor in" \
            "/etc/profile.d/modules.sh or the usual places of Lmod. Source its init file in $CPT_ENV_FILE."
    for folder in $CPT_MODULE_PATHS; do
        module use "$folder" || refuse "module use $folder failed."
    done
    # shellcheck disable=SC2086  # several modules
    module load $CPT_MODULES || refuse "module load $CPT_MODULES failed on $HOSTNAME."
    ! $unset_is_error || set -u
}

# Outside of the container: load modules, and set the commands that start a process inside it.
#   SRUN_CONTAINER  options for srun (Pyxis)
#   CONTAINER       words in front of a command (Apptainer)
prepare_container() {
    load_modules
    SRUN_CONTAINER=() CONTAINER=()
    local folder mounts=$PWD:$PWD binds=$CPT_BINDS
    [[ ! -d "$CPT_STAGE_DIR" ]] || binds+=" $CPT_STAGE_DIR"
    case $CPT_CONTAINER in
        apptainer | singularity)
            CONTAINER=("$CPT_CONTAINER" exec --nv --pwd "$PWD" --bind "$PWD")
            for folder in $binds; do CONTAINER+=(--bind "$folder"); done
            CONTAINER+=("$CPT_IMAGE")
            ;;
        pyxis)
            for folder in $binds; do mounts+=",$folder:$folder"; done
            SRUN_CONTAINER=(--container-image="$CPT_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD")
            ;;
    esac
}

# Inside: activate the virtual environment, unless the container has its own.
enter_environment() {
    if [[ "$CPT_CONTAINER" == none ]]; then
        PATH=$(cd "$CPT_VENV/bin" && pwd):$PATH
        export PATH
    fi
    if [[ -n "$CPT_MASTER_INTERFACE" ]]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$CPT_MASTER_INTERFACE}
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$CPT_MASTER_INTERFACE}
    fi
}

# Run one command of the project on this node, in the virtual environment or the container.
run_inside() {
    if [[ "$CPT_CONTAINER" == pyxis ]]; then
        # a step inherits no cores from sbatch (Slurm 22.05 and later), and a site may bind it to one
        srun --nodes=1 --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}" --cpu-bind=none \
            "${SRUN_CONTAINER[@]}" "$@"
    else
        (enter_environment && exec "${CONTAINER[@]}" "$@")
    fi
}

# Start Ray on all nodes of a Slurm job, run one command with it, and end it, however the command ends.
#   run_on_ray COMMAND...      returns the exit code of the command
run_on_ray() {
    local address port second code
    address=$(master_address) || exit
    port=$(free_port)
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0 CPT_RAY_NODES=$SLURM_NNODES
    RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
    trap stop_ray EXIT
    trap 'exit 143' TERM INT USR1
    # a process group of its own, so that a signal to the job ends Ray after the build and not before
    set -m
    srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --export=ALL --overlap --kill-on-bad-exit=0 \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --cpu-bind=none "${SRUN_CONTAINER[@]}" \
        "${CONTAINER[@]}" env CPT_ENV="${CPT_ENV:-slurm/env.sh}" bash slurm/ray_node.sh "$address" "$port" </dev/null &
    RAY_NODES=$!
    set +m
    for ((second = 0; second < 300; second++)); do
        kill -0 "$RAY_NODES" 2>/dev/null || { say "Ray ended while it started."; exit "$EXIT_INTERNAL"; }
        # shellcheck disable=SC2188  # only whether it opens
        ! (: <"/dev/tcp/$address/$port") 2>/dev/null || break
        sleep 1
    done
    export RAY_ADDRESS=$address:$port SLURM_OVERLAP=1
    set -m
    run_inside "$@" </dev/null &
    RAY_CLIENT=$!
    set +m
    wait "$RAY_CLIENT"
    code=$?
    RAY_CLIENT=
    return "$code"
}

# End the build, if it still runs, and Ray on all nodes.
stop_ray() {
    local second
    [[ -z "${RAY_CLIENT:-}" ]] || { kill -TERM -- -"$RAY_CLIENT" 2>/dev/null; wait "$RAY_CLIENT" 2>/dev/null; }
    [[ -n "${RAY_NODES:-}" ]] || return 0
    kill -USR1 "$RAY_NODES" 2>/dev/null # srun hands it on; SIGTERM would make it kill what it runs
    for ((second = 0; second < 30; second++)); do
        kill -0 -- -"$RAY_NODES" 2>/dev/null || break
        sleep 1
    done
    kill -KILL -- -"$RAY_NODES" 2>/dev/null
    wait "$RAY_NODES" 2>/dev/null
    RAY_NODES=
}

# Print the address at which all nodes reach this one, which must be the node of rank 0.
master_address() {
    local found=
    if [[ -n "$CPT_MASTER_INTERFACE" ]]; then
        found=$(ip -o -4 addr show dev "$CPT_MASTER_INTERFACE" | sed -n 's/.* inet \([0-9.]*\).*/\1/p' | head -n 1)
        [[ -n "$found" ]] || refuse "CPT_MASTER_INTERFACE=$CPT_MASTER_INTERFACE has no IPv4 address on $HOSTNAME."
    elif [[ -n "${SLURMD_NODENAME:-}" ]]; then
        found=$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    fi
    printf '%s\n' "${found:-$HOSTNAME}"
}

# Print a random free port below the range of outgoing connections.
free_port() {
    local port
    while port=$((20000 + RANDOM % 12000)); (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do :; done
    printf '%s\n' "$port"
}

# Return 0 if a server on this node says that it is well.
is_healthy() {
    local port=$1 code=
    exec 3<>"/dev/tcp/127.0.0.1/$port" || return 1
    printf 'GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n' >&3
    read -r -t 10 _ code _ <&3
    exec 3>&-
    [[ "$code" == 200 ]]
} 2>/dev/null

# Return 0 if only this user, or root, listens on a port of 127.0.0.1.
is_own_port() {
    local port users user
    printf -v port '%04X' "$1"
    users=$(awk -v port="$port" '$4 == "0A" && $2 ~ "^(0100007F|00000000):" port "$" { print $8 }' /proc/net/tcp)
    for user in $users; do
        [[ "$user" == "$UID" || "$user" == 0 ]] || return 1
    done
    [[ -n "$users" ]]
}

# Refuse if there is no vLLM.
find_server_program() {
    local -a command
    read -r -a command <<<"$CPT_VLLM"
    command -v "${command[0]}" >/dev/null || refuse "CPT_VLLM=$CPT_VLLM: no such program. docs/evaluate.md says how to install it."
}

# Serve a Hugging Face directory with vLLM on a free port of 127.0.0.1, and wait until it answers.  It ends with the job.
# Another user may take the port before vLLM does: what answers must belong to this user.  cpt suite run asks for its model.
#   start_server DIRECTORY GPUS LOG      sets SERVER_URL
start_server() {
    local directory gpus=$2 log=$3 port deadline
    local -a command
    directory=$(realpath "$1")
    port=$(free_port)
    SERVER_URL=http://127.0.0.1:$port
    read -r -a command <<<"$CPT_VLLM"
    command+=(serve "$directory" --served-model-name "$(basename "$directory")" --host 127.0.0.1 --port "$port"
        --tensor-parallel-size "$gpus" --max-model-len "$CPT_VLLM_CONTEXT" --reasoning-parser openai_gptoss
        "${CPT_VLLM_ARGUMENTS[@]}")
    trap stop_server EXIT
    trap 'exit 143' TERM
    # its own process group, so that its workers end with it
    set -m
    env --unset=CPT_JOB_SECRET "${command[@]}" </dev/null >>"$log" 2>&1 &
    SERVER=$!
    set +m
    say "serving $directory on $SERVER_URL, log $log"
    deadline=$((SECONDS + CPT_VLLM_START_SECONDS))
    until is_healthy "$port"; do
        kill -0 "$SERVER" 2>/dev/null || { say "vLLM ended while it started:"; tail -n 20 "$log" >&2; exit "$EXIT_INTERNAL"; }
        ((SECONDS < deadline)) || { say "vLLM does not answer after CPT_VLLM_START_SECONDS=$CPT_VLLM_START_SECONDS:"; tail -n 20 "$log" >&2; exit "$EXIT_INTERNAL"; }
        sleep 1
    done
    is_own_port "$port" || { say "port $port of 127.0.0.1 belongs to another user, who took it before vLLM did. Submit again."; exit "$EXIT_INTERNAL"; }
    say "vLLM answers"
}

# Stop the server and all its workers.
stop_server() {
    local second
    [[ -n "${SERVER:-}" ]] || return 0
    kill -TERM -- -"$SERVER" 2>/dev/null
    for ((second = 0; second < 30; second++)); do
        kill -0 -- -"$SERVER" 2>/dev/null || break
        sleep 1
    done
    kill -KILL -- -"$SERVER" 2>/dev/null
    wait "$SERVER" 2>/dev/null
    SERVER=
}

# Ask the run to stop.  The file names who asked, so that a later start knows whether it is a leftover.
ask_to_stop() {
    mkdir -p "$CPT_RUN_DIR"
    rm -f "$STOP_FILE"
    # noclobber: a link that somebody has put there in between is not written through
    if (set -o noclobber && printf 'job %s: %s\n' "$JOB" "$*" >"$STOP_FILE"); then
        say "$*: wrote $STOP_FILE; the run saves and stops"
    else
        say "$*: $STOP_FILE cannot be written, so the run goes on. Look what lies there; then touch $STOP_FILE"
    fi
}

# Remove a STOP file of this job that no run has obeyed, so that it does not stop the next start.  One from a person stays.
forget_own_stop() {
    if [[ -f "$STOP_FILE" && "$(<"$STOP_FILE")" == "job $JOB: "* ]]; then
        rm -f "$STOP_FILE"
    fi
}

# Turn signals into a request to stop.  `wait` returns when a signal arrives, so a flag is set.
listen_for_signals() {
    INTERRUPTED=0 ASKED_BY=
    local name
    for name in "$@"; do
        # shellcheck disable=SC2064  # the name is meant to be filled in now
        trap "INTERRUPTED=1; ASKED_BY=$name; ask_to_stop 'got SIG$name'" "$name"
    done
}

# Wait for a background process through signals, and return its exit code.
wait_for() {
    local code
    while INTERRUPTED=0; do
        wait "$1"
        code=$?
        ((INTERRUPTED)) || return "$code"
    done
}

# Run a Slurm job on all its nodes, wait, and decide what follows.
run_slurm_job() {
    JOB=$SLURM_JOB_ID
    RESTARTS=${SLURM_RESTART_COUNT:-0}
    STOP_AFTER_SECONDS=${CPT_STOP_AFTER_SECONDS:-0}
    local ranks=${CPT_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
    [[ -n "$ranks" ]] || refuse "the job has no GPUs and CPT_RANKS_PER_NODE is not set."
    queue_again() {
        requeue_slurm_job
    }
    # --wait: how long the other nodes may take once one has ended; --kill-on-bad-exit would interrupt their saves
    run_nodes "$SLURM_NNODES" "$ranks" \
        srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0 \
        --wait=300 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --cpu-bind=none "${SRUN_CONTAINER[@]}"
    conclude $?
}

# Run a PBS or AGE job on all its nodes, wait, and decide what follows.
#   run_submitted_job TEMPLATE READ_JOB NODES RANKS_PER_NODE [HOST_FILE]      with JOB and RESTARTS set
run_submitted_job() {
    local template=$1 read_job=$2 nodes=$3 ranks=$4 start
    [[ -n "$ranks" ]] || ranks=$(gpus_of_node)
    ((ranks > 0)) || refuse "CPT_RANKS_PER_NODE is not set, and $HOSTNAME shows no GPU: CUDA_VISIBLE_DEVICES lists none, and" \
        "neither does nvidia-smi -L. Set it in $CPT_ENV_FILE to the GPUs of a node."
    FIRST_JOB=${CPT_FIRST_JOB:-$JOB}
    prepare_resubmission "$read_job" "$nodes"
    start=$(mpirun_command "$nodes" "${5:-}") || exit
    queue_again() {
        submit_without_failed_nodes "$read_job" -v "$(variables_of_next_start)" "$template"
    }
    # mpirun carries no PATH to other nodes unless it is told, each MPI in its own words; `env` needs none of them
    CARRIED=(env "PATH=$PATH" ${LD_LIBRARY_PATH:+"LD_LIBRARY_PATH=$LD_LIBRARY_PATH"})
    # shellcheck disable=SC2086  # a command with its options
    run_nodes "$nodes" "$ranks" $start
    conclude $?
}

# Start node.sh on every node through the given command, wait, and return its exit code.
#   run_nodes NODES RANKS_PER_NODE START...      with JOB, RESTARTS, CONTAINER and NODE_COMMAND set
run_nodes() {
    local nodes=$1 ranks=$2 code address timer=
    shift 2
    address=$(master_address) || exit
    forget_own_stop
    remember_failures
    local settings=(
        CPT_ENV="${CPT_ENV:-slurm/env.sh}" CPT_RUN_DIR="$CPT_RUN_DIR" CPT_CONFIG="$CPT_CONFIG"
        CPT_DS_CONFIG="$CPT_DS_CONFIG" JOB="$JOB" SLURM_RESTART_COUNT="$RESTARTS" # tells cpt whether this is a restart
    )
    if [[ "$CPT_CONTAINER" != none && -n "$CPT_STAGE_DIR" && ! -d "$CPT_STAGE_DIR" ]]; then
        say "CPT_STAGE_DIR=$CPT_STAGE_DIR is not on this node, so the container cannot get it: the run reads from shared storage"
        CPT_STAGE_DIR=
        settings+=(CPT_STAGE_DROPPED=1)
    fi
    # the path as the first node has it: the variables of a job may be unknown to shells that mpirun starts
    [[ -z "$CPT_STAGE_DIR" ]] || settings+=(CPT_STAGE_DIR="$CPT_STAGE_DIR")
    # all starts of a job are one to the lock of the run directory
    [[ -z "$FIRST_JOB" ]] || settings+=(CPT_JOB="$FIRST_JOB")
    [[ -z "$JOB_END" ]] || settings+=(SLURM_JOB_END_TIME="$JOB_END") # and when it must have saved
    say "start $RESTARTS of at most $CPT_MAX_RESTARTS restarts: $nodes nodes x $ranks ranks, run directory $CPT_RUN_DIR"
    listen_for_signals USR1 TERM
    # its own process group: signals to this script's group must not reach srun, mpirun or a launcher
    set -m
    "$@" "${CARRIED[@]}" "${CONTAINER[@]}" env "${settings[@]}" bash slurm/node.sh "$address" "$(free_port)" "$nodes" "$ranks" \
        "${NODE_COMMAND[@]}" </dev/null &
    local run=$!
    if ((STOP_AFTER_SECONDS > 0)); then
        (sleep "$STOP_AFTER_SECONDS" && kill -USR1 $$) </dev/null &
        timer=$!
    fi
    set +m
    wait_for "$run"
    code=$?
    trap - USR1 TERM
    [[ -z "$timer" ]] || kill -- -"$timer" 2>/dev/null
    forget_own_stop
    rm -rf "$CPT_RUN_DIR/.copied-$JOB" # by which the nodes have waited for each other
    return "$code"
}

# Decide what follows a finished start.  The template defines queue_again, which puts the job back into the queue, without
# FAILED_NODE if it can.
conclude() {
    local code=$1 what=saved
    FAILED_NODE=
    if ((code == 0)); then
        say "done"
        exit 0
    fi
    if ((code != EXIT_REQUEUE)); then
        if ! may_restart "$code"; then
            say "exit code $code: not queued again (docs/slurm.md lists the codes). The same sbatch or qsub command goes on" \
                "from the newest checkpoint."
            exit "$code"
        fi
        what="failed with $code${FAILED_NODE:+ on $FAILED_NODE}"
    fi
    if ((RESTARTS >= CPT_MAX_RESTARTS)); then
        say "$what, but not queued again: $RESTARTS restarts used of CPT_MAX_RESTARTS=$CPT_MAX_RESTARTS"
    elif queue_again; then
        say "$what and queued again"
    else
        say "$what, but could not be queued again. The same sbatch or qsub command goes on."
    fi
    exit "$code"
}
