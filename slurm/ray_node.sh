#!/bin/bash
# One node of the Ray cluster of a data job: run Ray until a signal comes, and leave nothing behind.
#
#   ray_node.sh ADDRESS PORT
#
# prepare_data.sbatch starts it on every node at once, inside the container if there is one.  Node 0 is the head, which
# the others reach at ADDRESS:PORT.  RAY_AUTH_TOKEN in the environment keeps others out.

set -uo pipefail
umask 077
source slurm/lib.sh
load_settings
# a container brings its software
[[ "$CPT_CONTAINER" != none ]] || load_modules
enter_environment
readonly ADDRESS=$1 PORT=$2 NODE=${SLURM_NODEID:-0}
readonly RAY_OWN_MIB=3072 # kept for Ray itself and for the process that builds
[[ -n "${RAY_AUTH_TOKEN:-}" && "${RAY_AUTH_MODE:-}" == token ]] || refuse "ray_node.sh is started by prepare_data.sbatch, with a token."
command -v ray >/dev/null || refuse "CPT_DATA_ENGINE=ray, but ${CPT_IMAGE:-$CPT_VENV} has no program ray. Install gpt-oss-cpt[ray] there."

# Ray makes its folders and sockets writable by everyone: they stand in one that nobody else can enter.  The name of a
# socket has at most 107 characters, so this is not $TMPDIR; the folder below it becomes everyone's.
FOLDER=$(mktemp -d -p /tmp ray-XXXXXXXXXX) || refuse "no folder for Ray can be made in /tmp."
RAY=
# shellcheck disable=SC2317  # called by the traps
clean_up() {
    local tenth
    if [[ -n "$RAY" ]]; then
        kill -TERM "$RAY" 2>/dev/null
        # Slurm signals all processes of Ray at once, and then its autoscaler may not end by itself
        for ((tenth = 0; tenth < 50; tenth++)); do
            kill -0 "$RAY" 2>/dev/null || break
            sleep 0.1
        done
        kill -KILL -- -"$RAY" 2>/dev/null
    fi
    rm -rf "$FOLDER"
    say "Ray has ended on node $NODE"
}
trap clean_up EXIT
trap 'exit 143' TERM INT HUP USR1

# objects of a build are small: what is large goes through files
options=(--block --temp-dir="$FOLDER/r" --disable-usage-stats --include-log-monitor=false --object-store-memory=$((256 << 20))
    --num-cpus="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}")
# without --mem Ray looks at the node, and not at the job
if ((${SLURM_MEM_PER_NODE:-0} > 2 * RAY_OWN_MIB)); then
    options+=(--memory=$(((SLURM_MEM_PER_NODE - RAY_OWN_MIB) << 20)))
fi
if [[ -n "$CPT_MASTER_INTERFACE" ]]; then
    own=$(master_address) || exit
    options+=(--node-ip-address="$own")
fi
if ((NODE == 0)); then
    options+=(--head --port="$PORT" --include-dashboard=false)
    # Ray's proxy for clients elsewhere; its default port is the same for all jobs of a node
    ! python -c 'import grpc' 2>/dev/null || options+=(--ray-client-server-port="$(free_port)")
else
    options+=(--address="$ADDRESS:$PORT")
    for ((second = 0; second < 300; second++)); do
        # shellcheck disable=SC2188  # only whether it opens
        ! (: <"/dev/tcp/$ADDRESS/$PORT") 2>/dev/null || break
        sleep 1
    done
fi
export RAY_TMPDIR=$FOLDER
set -m
ray start "${options[@]}" </dev/null >"$FOLDER/start.log" 2>&1 &
RAY=$!
set +m
wait "$RAY"
code=$?
RAY=
say "Ray ended on node $NODE with $code:"
tail -n 20 "$FOLDER/start.log" >&2
exit "$((code ? code : EXIT_INTERNAL))"
