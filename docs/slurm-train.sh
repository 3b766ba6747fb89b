#!/bin/bash
#SBATCH --job-name=hiera-train
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
# Trains on all GPUs of all nodes, and queues itself again until the run is finished. docs/cluster.md explains it.
#   sbatch docs/slurm-train.sh train.mae image-mae-large --data.path /network/shards/imagenet --run.name big
set -uo pipefail
cd "$SLURM_SUBMIT_DIR" || exit 2
PY=${PY:-.venv/bin/python}

stopped=
stop() {
    stopped=1
    scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1

# Run a step of the job. If the job was warned meanwhile, requeue it after the step has ended.
step() {
    srun "$@" &
    local task=$!
    wait "$task"
    local code=$?
    if [ -n "$stopped" ]; then
        wait "$task"
        scontrol requeue "$SLURM_JOB_ID"
        exit "$code"
    fi
    [ "$code" -eq 0 ] || exit "$code"
}

export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5 NCCL_DEBUG=INFO

if [ -n "${STAGE:-}" ]; then
    step "$PY" -m tools.stage "$STAGE" "${TO:?is not set; name the local folder of the copy}"
fi

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
step --kill-on-bad-exit=1 "$PY" -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${GPUS:-$SLURM_GPUS_ON_NODE}" --rdzv-backend c10d \
    --rdzv-endpoint "$head:$((20000 + SLURM_JOB_ID % 12000))" --rdzv-id "$SLURM_JOB_ID" \
    --shutdown-timeout 240 -m "$@"
