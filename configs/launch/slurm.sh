#!/usr/bin/env bash
# Slurm: encode and train on all nodes of a job; before its time is up it saves and queues itself again.
#
#   lcm-kit cp launch/slurm my_job.sh            # then change the lines of #SBATCH to your cluster's
#   sbatch my_job.sh my.yaml [key=value ...]     # from a folder that all nodes share
#
# It can be submitted again at any time: what is done is not done again (docs/clusters.md).
#
#SBATCH --job-name=lcm-kit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:TERM@300

set -u
if [ $# -eq 0 ]; then
    echo "usage: sbatch $0 CONFIG [KEY=VALUE ...]" >&2
    exit 2
fi
# . /shared/lcm-kit/.venv/bin/activate           # where torchrun and lcm-kit are, if not on the PATH already

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}   # srun does not take it from the job by itself
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240             # seconds to save in: fewer than --signal gives
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1           # a node that comes back finds the new first one
step='' asked=''

# TERM reaches this shell alone. srun passes it on to torchrun on each node, and torchrun to its processes,
# which finish their step, save and leave.
trap 'asked=yes; if [ -n "$step" ]; then kill -TERM "$step"; fi' TERM

stage() {
    if [ -n "$asked" ]; then return 1; fi
    srun --kill-on-bad-exit=0 torchrun \
        --nnodes="$SLURM_NNODES" --nproc-per-node="${PROCESSES_PER_NODE:-gpu}" --max-restarts=3 \
        --rdzv-backend=c10d --rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))" \
        --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-$1" \
        -m lcm_kit "$@" &
    step=$!
    while kill -0 "$step" 2> /dev/null; do wait "$step"; done # a signal ends a `wait` early
    wait "$step"                                            # which remembers how it ended
}

stage encode "$@" && stage train "$@"
code=$?
if [ "$code" -ne 0 ] && [ -n "$asked" ]; then
    echo "stopped before the end; queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
