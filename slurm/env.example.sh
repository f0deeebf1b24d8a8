# shellcheck shell=bash disable=SC2034  # sourced: others use what is set here
# All settings of a site or a run, for all templates.     cp slurm/env.example.sh slurm/env.sh
#
# Bash, read by every job.  A variable that is already set wins, so one job can differ:
#     CPT_RUN_DIR=/scratch/runs/b CPT_CONFIG=configs/b.yaml sbatch slurm/train.sbatch
# No passwords or tokens here: ~/.netrc (mode 600) serves W&B, $HF_HOME/token the hub.

# --- read by sbatch itself, if this file is sourced before it:  source slurm/env.sh && sbatch --nodes=2 slurm/train.sbatch
#export SBATCH_ACCOUNT=my-project
#export SBATCH_PARTITION=gpu
#export SBATCH_TIMELIMIT=24:00:00

# --- the run
: "${CPT_RUN_DIR:=runs/gpt-oss-20b}"            # storage that all nodes see
: "${CPT_CONFIG:=configs/gpt-oss-20b.yaml}"
: "${CPT_DS_CONFIG:=ds_configs/z3_ep.json}"
CPT_RUN_ARGUMENTS=()                            # further options of cpt/run.py, e.g. (--set train.lr=1e-5); a build that is not in
                                                # data/ of this folder: (--set data.build_dir=/shared/data/my-mix)
: "${CPT_MAX_RESTARTS:=20}"                     # a job is put back into the queue at most this often
: "${CPT_RESTART_ON_FAILURE:=0}"                # and so often in a row after an error (70, 71) or a killed rank without a new checkpoint
: "${CPT_SAVE_SECONDS:=600}"                    # how long ranks without a launcher may take to save and exit; all of 120b: 1800

# --- the software: modules and a venv, or a container
: "${CPT_MODULES:=}"                            # for `module load`, e.g. "cuda/13.0 apptainer"
: "${CPT_MODULE_PATHS:=}"                       # for `module use`, before that
: "${CPT_CONTAINER:=none}"                      # none, apptainer, singularity, pyxis
: "${CPT_VENV:=.venv}"                          # used without a container
: "${CPT_IMAGE:=}"                              # apptainer: file.sif; pyxis: file.sqsh or registry#name
: "${CPT_BINDS:=}"                              # folders that the container needs besides the repository, e.g. "/data /scratch"

# --- data (slurm/prepare_data.sbatch)
: "${CPT_DATA_ENGINE:=local}"                   # ray: one job on several nodes, which starts Ray on them (docs/data.md)

# --- evaluation (slurm/evaluate.sbatch): each tool in an environment of its own; docs/evaluate.md says how to install them
# With a container vLLM starts outside of it, and lm_eval and lighteval inside: they must be in the image or in a folder of CPT_BINDS.
: "${CPT_SUITE:=configs/suites/gpt-oss.yaml}"   # benchmarks, and how the model is asked
: "${CPT_VLLM:=vllm}"                           # words that start vLLM, e.g. /opt/vllm/bin/vllm, "apptainer exec --nv vllm.sif vllm"
: "${CPT_VLLM_CONTEXT:=40960}"                  # tokens: asking.prompt_tokens + asking.max_new_tokens of the suite
: "${CPT_VLLM_START_SECONDS:=1800}"             # how long it may take to load
CPT_VLLM_ARGUMENTS=()                           # further options of vllm serve, e.g. (--gpu-memory-utilization 0.9)
: "${CPT_LM_EVAL:=lm_eval}"                     # words that start lm-evaluation-harness
: "${CPT_LIGHTEVAL:=lighteval}"                 # e.g. "uv run --project /opt/swallow-evaluation-instruct --locked --extra lighteval lighteval"

# --- the nodes
: "${CPT_RANKS_PER_NODE:=}"                     # empty: the GPUs that the job has on a node; PBS and AGE: those that the first node shows
: "${CPT_MASTER_INTERFACE:=}"                   # e.g. ib0; empty: the address by which the scheduler knows the node

# --- copies of build and weights on a disk of each node, which the ranks read; checkpoints stay in CPT_RUN_DIR
# With a container the folder must exist on every node before the job starts; without one it is made.
: "${CPT_STAGE_DIR:=}"                          # a folder that every node has, e.g. "$SLURM_TMPDIR", "$PBS_LOCALDIR"; empty: none
: "${CPT_STAGE_KEEP:=0}"                        # 1: the copies stay, and the next job on the node reads them if nothing has changed
: "${CPT_STAGE_SECONDS:=7200}"                  # how long a node waits for the others to copy

# --- caches; what is compiled is loaded and run, so never name a folder here that others could make first
#export HF_HOME=/scratch/hf
: "${CPT_JOB_CACHES:=0}"                        # 1: compile into a new private folder of the job on each node ($TMPDIR), removed at its end;
                                                # 0: into the home directory, or where TRITON_CACHE_DIR and TORCH_EXTENSIONS_DIR say

# --- directories of other users, or writable by a group, that runs and builds may be in all the same (docs/reliability.md)
#export CPT_SHARED_DIRS=/groups/lab/built:/groups/lab/runs

# --- PBS and AGE only: the run saves before the time limit, and the job is submitted again
: "${CPT_STOP_MARGIN_SECONDS:=600}"             # how long before the limit; the limit is read from qstat; all of 120b: 1800
: "${CPT_STOP_AFTER_SECONDS:=}"                 # after so many seconds instead; 0: never
: "${CPT_SUBMIT:=qsub}"                         # with queue, group, nodes and limit from qstat; or the whole command
: "${CPT_KEEP_RESOURCES=filesystems}"           # PBS: further job-wide resources (-l) that the next start asks for
: "${CPT_KEEP_VARIABLES=RTYPE USE_SSH}"         # further variables (-v) that it gets; these are ABCI's
: "${CPT_MPIRUN:=}"                             # starts one process on each of NODES nodes; empty: by the mpirun that is there
