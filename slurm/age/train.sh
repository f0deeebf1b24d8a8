#!/bin/bash
# Train on 1 to n nodes under AGE, the Grid Engine of TSUBAME, as slurm/train.sbatch does under SLURM.
#
#   qsub -g GROUP -l node_f=2 -l h_rt=24:00:00 slurm/age/train.sh
#
# Submit from the repository; settings are in slurm/env.sh.  Ten minutes before h_rt (CPT_STOP_MARGIN_SECONDS) the run
# saves, and the job submits itself again with the same group, reservation, nodes and h_rt, which it reads from qstat.
# Both need `qstat` and `qsub` on the compute node; where they are missing the job says so at its start.
# Written from the manual and tried with stand-ins for qsub, qstat and mpirun, not on an AGE cluster.

#$ -N cpt
#$ -cwd
#$ -j y
#$ -o logs/
#$ -l node_f=1
#$ -l h_rt=24:00:00

set -uo pipefail
umask 077
cd "${SGE_O_WORKDIR:-.}" || exit 78
[[ -f slurm/lib.sh ]] || { echo "$PWD has no slurm/lib.sh. Submit in the repository or in a folder of cpt init." >&2; exit 78; }
source slurm/lib.sh
source slurm/resubmit.sh
load_settings
prepare_container

# shellcheck disable=SC2153  # set by AGE
JOB=$JOB_ID
RESTARTS=${CPT_RESTARTS:-0}
run_submitted_job slurm/age/train.sh read_age_job "${NHOSTS:-1}" "$CPT_RANKS_PER_NODE"
