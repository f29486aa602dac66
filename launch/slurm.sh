#!/bin/bash
# A run on a Slurm cluster. It saves two minutes before its time is over, stands in the queue again, and goes on.
#
#   sbatch launch/slurm.sh --config 124M --data $SCRATCH/data/fineweb-10B
#
# Change the #SBATCH lines; RUN, which must lie on a disk that all nodes see; the line that activates your environment.
# The longest step and the save must fit into the seconds of --signal. The words after the script go to `gpt2repro train`.
#SBATCH --job-name=gpt2
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

RUN=${RUN:-$SCRATCH/runs/gpt2}
PROCESSES=${SLURM_GPUS_ON_NODE:-8}
# source $HOME/venv/bin/activate

# torchrun hands on the signals that are named here (the second name is for torch before 2.13), then waits so long.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCHELASTIC_SIGNALS_TO_HANDLE=$PET_SIGNALS_TO_HANDLE TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export RUN PROCESSES HEAD

rm -f "$RUN/status.json"             # the last job's end must not be taken for this one's
# One torchrun per node; srun tells each its number. Single quotes: $SLURM_NODEID is known on the node only.
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node_rank "$SLURM_NODEID" \
    --nproc_per_node "$PROCESSES" --master_addr "$HEAD" --master_port "${PORT:-29500}" \
    -m gpt2repro train --run_dir "$RUN" "$@"' gpt2repro "$@"
code=$?

# Stopped by the warning, after saving (3): stand in the queue again, where the same command goes on.
if grep -q '"exit_code": 3' "$RUN/status.json"; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
