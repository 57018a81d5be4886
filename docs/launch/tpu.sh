#!/bin/bash
# A selection on a TPU slice of several hosts: POD=name ZONE=zone bash tpu.sh. Every host runs the same command; jax asks
# the slice for the others. The directory of --out is one that all hosts see.
set -euo pipefail
gcloud compute tpus tpu-vm ssh "$POD" --zone="$ZONE" --worker=all --command="
    ntkjax select --model /shared/model --domain /shared/domain.jsonl --pool /shared/pool --n 9000 \
        --mesh data=8,fsdp=8 --out /shared/run"
