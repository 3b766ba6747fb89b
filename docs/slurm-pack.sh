#!/bin/bash
#SBATCH --job-name=hiera-pack
#SBATCH --array=1-16
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=32
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A-%a.out
# Packs in parts, one for each task of the array; docs/cluster.md explains it. Part 0 comes last and finishes:
#   pack="docs/slurm-pack.sh tools.pack images --source /network/imagenet --out /network/shards/imagenet"
#   sbatch --dependency=afterok:$(sbatch --parsable $pack) --array=0 $pack
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

part=()
if [ "$SLURM_ARRAY_TASK_ID" -gt 0 ]; then
    part=(--shard-range "$SLURM_ARRAY_TASK_ID/${PARTS:-16}")
fi
exec "${PY:-.venv/bin/python}" -m "$@" --workers "$SLURM_CPUS_PER_TASK" "${part[@]}"
