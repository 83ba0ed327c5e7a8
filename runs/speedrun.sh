#!/usr/bin/env bash
# The speedrun of the public nanochat: a d24 on the 8 GPUs of one machine, from text to samples. Never run by us.
#   bash runs/speedrun.sh
#   NPROC_PER_NODE=4 bash runs/speedrun.sh                                 # 4 GPUs: the same batch, twice the time
#   NNODES=2 RDZV_ENDPOINT=10.0.0.1:29400 bash runs/speedrun.sh            # the same on two machines, started on each
# A lost process starts all again from the last checkpoint, up to three times; after a preemption the same command goes on.
# Variables and arguments as for speedrun_small.sh. For SLURM: runs/slurm.sbatch.
PROFILE="${PROFILE:-speedrun-d24}" DEVICE_TYPE="${DEVICE_TYPE:-cuda}" NPROC_PER_NODE="${NPROC_PER_NODE:-8}"
MAX_RESTARTS="${MAX_RESTARTS:-3}"
source "$(dirname "${BASH_SOURCE[0]}")/speedrun_small.sh"
