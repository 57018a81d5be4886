#!/bin/bash
# A selection as one job of four nodes with eight GPUs each: sbatch slurm.sh
#SBATCH --job-name=select
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
# --signal: two minutes before the end every task gets SIGTERM; training saves the step at hand and exits with 143.
# The job may be submitted again as it is: it goes on from what is finished in --out.
set -euo pipefail
srun --kill-on-bad-exit=1 ntkjax select \
    --model /shared/model --domain /shared/domain.jsonl --pool /shared/pool --n 9000 \
    --mesh data=4,fsdp=8 --out /shared/run
