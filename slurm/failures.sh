# shellcheck shell=bash  # sourced by lib.sh
# Whether a training job that failed is started again, and without which node.
#
# Decisions
#   CPT_RESTART_ON_FAILURE=N starts a run again after an internal error (70), a hung rank (71) or a killed one, at most N
#   times without a newer checkpoint in between: what fails at the same step again would fail forever.
#   A node is avoided only if it is known to be its fault: a rank of it was killed or hung, or it is not the first rank's.
#   Each failed start is a line in <run_dir>/failed-starts: newest step, exit code, node.  A person's new job begins a new one.

FAILURE_BEFORE= # last_failure.json as this start found it

failed_starts_file() {
    printf '%s\n' "$CPT_RUN_DIR/failed-starts"
}

# Note what an earlier start has left; call it before the run.
remember_failures() {
    ((RESTARTS > 0)) || rm -f "$(failed_starts_file)"
    FAILURE_BEFORE=$(stat -c '%i %y' "$CPT_RUN_DIR/last_failure.json" 2>/dev/null)
}

# Print the step of the newest checkpoint; 0 without one.
newest_step() {
    local path step newest=0
    for path in "$CPT_RUN_DIR"/checkpoints/step-*/manifest.json; do
        [[ "$path" =~ /step-([0-9]+)/manifest.json$ && -e "$path" ]] || continue
        step=$((10#${BASH_REMATCH[1]}))
        ((step <= newest)) || newest=$step
    done
    printf '%s\n' "$newest"
}

# Print the node that this start failed on; nothing if that is not known.
failed_node() {
    local file=$CPT_RUN_DIR/last_failure.json text node
    field() { sed -n "s/^ *\"$1\": *\"\{0,1\}\([^\",]*\)\"\{0,1\},\{0,1\}$/\1/p" <<<"$text"; }
    [[ -r "$file" && "$(stat -c '%i %y' "$file")" != "$FAILURE_BEFORE" ]] || return 0
    text=$(<"$file")
    [[ "$(field exit_code)" == "$EXIT_HUNG" || "$(field signal)" != 0 || "$(field rank)" != 0 ]] || return 0
    node=$(field node)
    node=${node:-$(field host)}
    [[ ! "$node" =~ ^[A-Za-z0-9._-]+$ ]] || printf '%s\n' "$node"
}

# Return 0 if a start that ended with this code is to be followed by another one, and write it down.
#   may_restart CODE      sets FAILED_NODE
may_restart() {
    local code=$1 step times
    FAILED_NODE=
    ((CPT_RESTART_ON_FAILURE > 0 && ${#NODE_COMMAND[@]} == 0)) || return 1
    ((code == EXIT_INTERNAL || code == EXIT_HUNG || code > 128)) || return 1
    if [[ "$ASKED_BY" == TERM ]]; then
        say "the job was told to end (SIGTERM): no other start"
        return 1
    fi
    step=$(newest_step)
    times=$(grep -c "^$step " "$(failed_starts_file)" 2>/dev/null)
    if ((times >= CPT_RESTART_ON_FAILURE)); then
        say "failed $((times + 1)) times with step $step as the newest checkpoint, CPT_RESTART_ON_FAILURE=$CPT_RESTART_ON_FAILURE"
        return 1
    fi
    FAILED_NODE=$(failed_node)
    # what cannot be counted is not repeated; a link is not written through
    [[ ! -L "$(failed_starts_file)" ]] || return 1
    mkdir -p "$CPT_RUN_DIR" && printf '%s %s %s\n' "$step" "$code" "${FAILED_NODE:--}" >>"$(failed_starts_file)"
}

# Print the nodes of all failed starts of this job, each once, with a character between them.
failed_nodes() {
    awk -v between="$1" '$3 != "-" && !seen[$3]++ { list = list (list == "" ? "" : between) $3 } END { print list }' \
        "$(failed_starts_file)" 2>/dev/null
}

# Put a Slurm job back into the queue; with FAILED_NODE, without that node.
requeue_slurm_job() {
    local nodes before try
    # nodes can be excluded of a job that waits only, and Slurm ends this script once it waits
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID" || return
    [[ -n "${FAILED_NODE:-}" ]] || return 0
    # Slurm may know the node by less than its full name
    nodes=$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" | grep -Fx -e "$FAILED_NODE" -e "${FAILED_NODE%%.*}" | head -n 1)
    if [[ -z "$nodes" ]]; then
        say "node $FAILED_NODE is not in SLURM_JOB_NODELIST=${SLURM_JOB_NODELIST:-}: it is not excluded"
        return 0
    fi
    before=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    [[ -z "$before" || "$before" == "(null)" ]] || nodes=$before,$nodes
    for ((try = 0; try < 20; try++)); do
        if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$nodes" 2>/dev/null; then
            say "without node $nodes"
            return 0
        fi
        sleep 0.5
    done
    say "node $FAILED_NODE could not be excluded: scontrol update JobId=$SLURM_JOB_ID ExcNodeList=$nodes"
}
