# shellcheck shell=bash disable=SC2034  # sourced: others use what is set here
# What a PBS or AGE job knows about itself, so that it stops in time and is submitted again with the same request.
#
# Decisions
#   These schedulers have no `requeue` that a user may call, so a job submits itself again.  `qsub` alone would take the
#   few lines at the head of the template; queue, group, nodes and time limit are read from `qstat` at the start, while
#   they can be refused, and not at the end.
#   A CPT_SUBMIT of more than one word is a person's own command and is used as it stands.

# Print one value of the job's description, which is read from standard input.
#   pbs_field NAME     of `qstat -f`: lines are wrapped at 79 columns, in the middle of words, and go on after a tab
#   age_field NAME     of `qstat -j`
pbs_field() {
    awk -v name="$1" '
        /^\t/ || (!/^ +[A-Za-z_][A-Za-z0-9_.-]* = / && !/^Job Id:/) { sub(/^[[:space:]]+/, ""); line = line $0; next }
        { show(line); line = $0 }
        END { show(line) }
        function show(text) {
            sub(/^[[:space:]]+/, "", text)
            if (index(text, name " = ") == 1) print substr(text, length(name) + 4)
        }'
}

age_field() {
    sed 's/^hard_resource_list:/hard resource_list:/' | awk -v name="$1:" 'index($0, name) == 1 { text = substr($0, length(name) + 1); sub(/^[[:space:]]+/, "", text); print text; exit }'
}

# Print a time limit in seconds: S, M:S, H:M:S or D:H:M:S.  Return 1 for anything else.
seconds_of() {
    local part parts sum=0 place=0
    local -a units=(1 60 3600 86400)
    [[ "$1" =~ ^[0-9]+(:[0-9]+){0,3}$ ]] || return 1
    IFS=: read -r -a parts <<<"$1"
    for ((part = ${#parts[@]} - 1; part >= 0; part--, place++)); do
        sum=$((sum + 10#${parts[part]} * units[place]))
    done
    printf '%s\n' "$sum"
}

# Read what PBS knows about this job.  Sets REQUEST (options for qsub) and LEFT_SECONDS (of its time; empty: unknown).
read_pbs_job() {
    local text value name limit used
    REQUEST=() LEFT_SECONDS=
    text=$(qstat -f "$PBS_JOBID" 2>&1) || { say "qstat -f $PBS_JOBID: ${text:-failed}"; return 1; }
    # the queue that was asked for: a routing queue passes jobs on to one that takes none from users
    value=${PBS_O_QUEUE:-$(pbs_field queue <<<"$text")}
    REQUEST+=(${value:+-q "$value"})
    value=$(pbs_field project <<<"$text")
    [[ -z "$value" || "$value" == _pbs_project_default ]] || REQUEST+=(-P "$value")
    value=$(pbs_field Account_Name <<<"$text")
    REQUEST+=(${value:+-A "$value"})
    value=$(pbs_field group_list <<<"$text")
    REQUEST+=(${value:+-W "group_list=$value"})
    value=$(pbs_field Job_Name <<<"$text")
    REQUEST+=(${value:+-N "$value"})
    # other entries of Resource_List are sums over the chunks, which qsub refuses beside a select
    for name in select place walltime $CPT_KEEP_RESOURCES; do
        value=$(pbs_field "Resource_List.$name" <<<"$text")
        REQUEST+=(${value:+-l "$name=$value"})
    done
    limit=$(seconds_of "$(pbs_field Resource_List.walltime <<<"$text")") || limit=
    used=$(seconds_of "$(pbs_field resources_used.walltime <<<"$text")") || used=0
    [[ -z "$limit" ]] || LEFT_SECONDS=$((limit - used))
    [[ -n "$(pbs_field Resource_List.select <<<"$text")" ]] || { say "qstat -f $PBS_JOBID shows no Resource_List.select"; return 1; }
}

# Read what AGE knows about this job.  Sets REQUEST and LEFT_SECONDS.
read_age_job() {
    local text value resources
    REQUEST=() LEFT_SECONDS=
    text=$(qstat -j "$JOB_ID" 2>&1) || { say "qstat -j $JOB_ID: ${text:-failed}"; return 1; }
    # TSUBAME's -g sets the job's group; on other systems it is that of the account, and qsub has no -g
    value=$(age_field group <<<"$text")
    [[ -z "$value" || "$value" == "$(id -gn -- "${USER:-$(id -un)}")" ]] || REQUEST+=(-g "$value")
    value=$(age_field project <<<"$text")
    [[ -z "$value" || "$value" == NONE ]] || REQUEST+=(-P "$value")
    value=$(age_field ar_id <<<"$text")
    REQUEST+=(${value:+-ar "$value"})
    value=$(age_field priority <<<"$text")
    [[ ! "$value" =~ ^-[0-9]+$ ]] || REQUEST+=(-p "$value")
    value=$(age_field job_name <<<"$text")
    REQUEST+=(${value:+-N "$value"})
    value=$(age_field "parallel environment" <<<"$text")
    [[ ! "$value" =~ ^(.+)" range: "([0-9-]+)$ ]] || REQUEST+=(-pe "${BASH_REMATCH[1]}" "${BASH_REMATCH[2]}")
    resources=$(age_field "hard resource_list" <<<"$text")
    [[ -n "$resources" ]] || { say "qstat -j $JOB_ID shows no hard resource_list"; return 1; }
    REQUEST+=(-l "$resources")
    [[ ! ",$resources" =~ ,h_rt=([0-9:]+) ]] || LEFT_SECONDS=$(seconds_of "${BASH_REMATCH[1]}")
}

# Decide at the start with which words this job is submitted again, and when it stops.
#   prepare_resubmission READ_JOB NODES      READ_JOB: read_pbs_job or read_age_job
# Sets SUBMIT (a command), STOP_AFTER_SECONDS (0: never) and JOB_END (seconds since 1970; empty: unknown).
prepare_resubmission() {
    local known=true
    "$1" || known=false
    read -r -a SUBMIT <<<"$CPT_SUBMIT"
    command -v "${SUBMIT[0]}" >/dev/null ||
        say "${SUBMIT[0]} is not on this node: the job cannot queue itself again. Submit it by hand after each stop."
    if ((${#SUBMIT[@]} == 1)); then
        if ! $known; then
            (($2 == 1)) || refuse "the request of this job cannot be read from qstat, and CPT_SUBMIT is '$CPT_SUBMIT'," \
                "which would ask for other nodes than these $2. Set CPT_SUBMIT to the whole qsub command, without the template."
            say "the request of this job cannot be read from qstat: the next start asks for what the template's head says." \
                "Set CPT_SUBMIT to the whole qsub command to change that."
        fi
        SUBMIT+=("${REQUEST[@]}")
    fi
    set_stop_time
}

# Set STOP_AFTER_SECONDS and JOB_END from CPT_STOP_AFTER_SECONDS, or from the time that is left.
set_stop_time() {
    local margin=$CPT_STOP_MARGIN_SECONDS
    JOB_END=
    [[ -z "$LEFT_SECONDS" ]] || JOB_END=$(($(date +%s) + LEFT_SECONDS))
    STOP_AFTER_SECONDS=$CPT_STOP_AFTER_SECONDS
    if [[ -n "$STOP_AFTER_SECONDS" ]]; then
        ((STOP_AFTER_SECONDS > 0)) || say "CPT_STOP_AFTER_SECONDS is 0: nothing makes the run save before its time is up." \
            "Leave it empty to stop CPT_STOP_MARGIN_SECONDS=$margin before the time limit."
    elif [[ -n "$LEFT_SECONDS" ]]; then
        # a short job keeps half of its time
        ((2 * margin <= LEFT_SECONDS)) || margin=$((LEFT_SECONDS / 2))
        STOP_AFTER_SECONDS=$((LEFT_SECONDS - margin))
        say "stops after $STOP_AFTER_SECONDS s, $margin s before the time limit"
    else
        STOP_AFTER_SECONDS=0
        say "the time limit of this job is unknown: nothing makes the run save before it. Set CPT_STOP_AFTER_SECONDS."
    fi
}

# Print how many GPUs this node gives to the job, for schedulers that do not tell it; 0 if that cannot be known.
gpus_of_node() {
    local ids=${CUDA_VISIBLE_DEVICES:-} commas
    commas=${ids//[!,]/}
    if [[ "$ids" =~ ^([0-9]+|(GPU|MIG)-[^,]+)(,|$) ]]; then
        printf '%s\n' $((${#commas} + 1))
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU [0-9]'
    fi
}

# Submit this job again, under AGE without the nodes of failed starts.
#   submit_without_failed_nodes READ_JOB WORDS...
submit_without_failed_nodes() {
    local read_job=$1 nodes word=0
    shift
    nodes=$(failed_nodes '|')
    if [[ -n "$nodes" && "$read_job" == read_age_job ]]; then
        # what the last start was told to avoid is in the list of its resources
        for ((word = 1; word < ${#SUBMIT[@]}; word++)); do
            SUBMIT[word]=$(sed -E 's/,hostname=![^,]*//; s/^hostname=![^,]*,//' <<<"${SUBMIT[word]}")
        done
        SUBMIT+=(-l "hostname=!($nodes)")
        say "without node $nodes"
    elif [[ -n "${FAILED_NODE:-}" ]]; then
        say "PBS cannot be told to avoid node $FAILED_NODE: the next start may get it again. Tell the operators."
    fi
    "${SUBMIT[@]}" "$@"
}

# Print the variables for `qsub -v`: they count the restart and keep the settings of the first submission.
variables_of_next_start() {
    local name list=CPT_RESTARTS=$((RESTARTS + 1)),CPT_FIRST_JOB=$FIRST_JOB
    for name in CPT_ENV CPT_RUN_DIR CPT_CONFIG CPT_DS_CONFIG $CPT_KEEP_VARIABLES; do
        list+=${!name:+,$name=${!name}}
    done
    printf '%s\n' "$list"
}

# Print the command that starts one process on each node, unless CPT_MPIRUN is one.
#   mpirun_command NODES [HOST_FILE]
mpirun_command() {
    local nodes=$1 hosts=${2:-} version
    if [[ -n "$CPT_MPIRUN" ]]; then
        printf '%s\n' "${CPT_MPIRUN//NODES/$nodes}"
        return
    fi
    version=$(mpirun --version 2>/dev/null)
    case $version in
        *"Open MPI"* | *OpenRTE*) printf '%s\n' "mpirun -n $nodes --map-by ppr:1:node${hosts:+ --hostfile $hosts}" ;;
        *"Intel(R) MPI"* | *HYDRA*) printf '%s\n' "mpirun -n $nodes -ppn 1${hosts:+ -f $hosts}" ;;
        *) refuse "mpirun --version names neither Open MPI nor Intel MPI nor MPICH (CPT_MODULES='$CPT_MODULES')." \
            "Load one with CPT_MODULES, or set CPT_MPIRUN to the command that starts one process on each node." ;;
    esac
}
