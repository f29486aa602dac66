#!/bin/bash
# torchrun elastic: when a worker dies, all of them start again and go on from the newest checkpoint.
#
#   launch/elastic.sh --config 124M --data data/fineweb-10B --run_dir /shared/runs/gpt2       on every machine
#
# Change, here or in the environment: NODES (2, or 1:4 to go on with as many as there are), PROCESSES (GPUs of a machine),
# HEAD (any of the machines, the same word on all). The run directory must lie on a disk that all machines see.
# Up to RESTARTS times; a run that ends with bad numbers or wrong options starts again as well, so look at its log.
set -euo pipefail
# Else the new workers meet the old ones' addresses in the agent's store and wait in vain (pytorch/pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nnodes "${NODES:-1}" --nproc_per_node "${PROCESSES:-8}" --max_restarts "${RESTARTS:-3}" \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv_id "${JOB:-gpt2}" \
    -m gpt2repro train "$@"
