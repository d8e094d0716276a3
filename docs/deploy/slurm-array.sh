#!/usr/bin/env bash
# A grid as a SLURM job array, a run a task: sbatch docs/deploy/slurm-array.sh OUT [FLAG...]
#
# A task that was requeued goes on where it was. When all are done: python -m fedsam.report OUT
#SBATCH --array=0-8
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --requeue
set -euo pipefail

out=${1:?usage: slurm-array.sh OUT [FLAG...]}
shift
alphas=(0 0.05 100)
seeds=(0 1 2)

task=${SLURM_ARRAY_TASK_ID:?run this by sbatch, or give a task number in SLURM_ARRAY_TASK_ID}
alpha=${alphas[task / ${#seeds[@]}]}
seed=${seeds[task % ${#seeds[@]}]}
exec python3 -m fedsam.simulate --alpha "$alpha" --seed "$seed" --threads "${SLURM_CPUS_PER_TASK:-1}" \
    --out "$out/alpha=$alpha,seed=$seed" --go-on "$@"
