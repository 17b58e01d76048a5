#!/bin/bash
# One run on every GPU of two nodes. Slurm warns two minutes before the time is up: the run saves, this script
# queues itself again and goes on. Cores instead: no --gpus-per-node, --ntasks-per-node 1, --cpus-per-task 64.
#
#     sbatch slurm_imp.sh
#
#SBATCH --job-name=lottery
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

srun python -m sparselth imp --model resnet20 --seeds 0-9 --out "$HOME/runs/resnet20" --resume
code=$?
if [ $code -eq 130 ]; then # stopped by the signal, and saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
