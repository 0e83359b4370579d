#!/usr/bin/env bash
# sbatch --gpus-per-node=1 cloud/slurm.sh recipe.yaml
# Several GPUs of one node: sbatch --gpus-per-node=4 cloud/slurm.sh recipe.yaml
#SBATCH --job-name=lorakit
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

recipe=$1
# The name of the job stays when it is requeued, so it goes on with the same run.
run="runs/job-${SLURM_JOB_ID}"
gpus=${SLURM_GPUS_ON_NODE:-1}

# SIGTERM comes 120 s before the limit: the step is finished, a checkpoint is saved, exit code 143.
arguments=(train "$recipe" --output "$run" --gpus "$gpus")
if [[ -d $run ]]; then
  arguments+=(--resume)
fi
code=0
srun lorakit "${arguments[@]}" || code=$?
if [[ $code -eq 143 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
