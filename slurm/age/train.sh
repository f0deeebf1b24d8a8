#!/bin/bash
# Train on 1 to n nodes under AGE, the Grid Engine of TSUBAME, as slurm/train.sbatch does under SLURM.
#
#   qsub -g GROUP -l node_f=2 -l h_rt=24:00:00 slurm/age/train.sh
#
# Submit from the repository; settings are in slurm/env.sh.  Set CPT_STOP_AFTER_SECONDS to h_rt less the time of a save,
# and CPT_SUBMIT to "qsub -g GROUP -l node_f=2 -l h_rt=24:00:00", which submits the job again; where a compute
# node may not call qsub, submit it by hand: it resumes from the newest checkpoint.
# Written from the manual and tried with stand-ins for qsub and mpirun, not on an AGE cluster.

#$ -N cpt
#$ -cwd
#$ -j y
#$ -l node_f=1
#$ -l h_rt=24:00:00

set -uo pipefail
umask 077
cd "${SGE_O_WORKDIR:-.}" || exit 78
[[ -f slurm/lib.sh ]] || { echo "$PWD is not the repository. Submit there." >&2; exit 78; }
source slurm/lib.sh
load_settings
prepare_container

# shellcheck disable=SC2153  # set by AGE
JOB=$JOB_ID
RESTARTS=${CPT_RESTARTS:-0}
NODES=${NHOSTS:-1}
RANKS=$CPT_RANKS_PER_NODE
[[ -n "$RANKS" ]] || refuse "CPT_RANKS_PER_NODE is not set."

queue_again() {
    $CPT_SUBMIT -v "$(variables_of_next_start)" slurm/age/train.sh
}

# shellcheck disable=SC2086  # a command with its options
run_nodes "$NODES" "$RANKS" ${CPT_MPIRUN//NODES/$NODES}
conclude $?
