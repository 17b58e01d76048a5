#!/bin/bash
# A sweep on Slurm: sbatch examples/sweep_ray.sh. One Ray node per machine, one actor per GPU.
# Stopped, requeued or extended, the same job goes on with the same folder.
#SBATCH --job-name=sparselth-sweep
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=4
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@60
#SBATCH --requeue
set -euo pipefail

OUT=${OUT:-$PWD/runs/rates}                  # on a file system that all nodes share
export SPARSELTH_DATA=${SPARSELTH_DATA:-$PWD/data}
mkdir -p "$SPARSELTH_DATA"

# Only who has the token in this user's home takes part; releases of Ray without tokens take no notice.
export RAY_AUTH_MODE=token
ray get-auth-token --generate >/dev/null 2>&1 || true

nodes=($(scontrol show hostnames "$SLURM_JOB_NODELIST"))
head=${nodes[0]}
port=6379
per_node="--num-cpus $SLURM_CPUS_PER_TASK --num-gpus ${SLURM_GPUS_ON_NODE:-0}"

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$head" --port=$port $per_node --disable-usage-stats --block &
sleep 20
if ((${#nodes[@]} > 1)); then
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$head" \
    ray start --address="$head:$port" $per_node --disable-usage-stats --block &
  sleep 20
fi

# Sixty seconds before its time is up the sweep saves; the job is put back and goes on.
sparselth sweep imp --model lenet5 --grid rate=0.1,0.2,0.4 --grid lr=1.2e-3,6e-4 --seeds 0-9 \
  --executor ray --address "$head:$port" --out "$OUT" --resume &
sweep=$!
trap 'kill -USR1 $sweep; wait $sweep || true; kill $(jobs -p) || true; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
code=0
wait $sweep || code=$?
kill $(jobs -p) || true  # Ray's nodes
exit $code
