#!/usr/bin/env bash
# Train @{name} on @{hosts} node(s) of @{gpus} GPUs: one process per GPU, as JAX expects in SLURM. Printed by
#
#   python -m jaxllm.tools.launch --config=@{config} --for=slurm --nodes=@{hosts}
#
#   sbatch this_file.sh
#
# Before, once, where all nodes see it: uv venv --python 3.12 venv, then
# uv pip install --python venv/bin/python '.[cuda13]' (cuda12 for older drivers).
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{hosts}
#SBATCH --ntasks-per-node=@{gpus}
#SBATCH --gpus-per-node=@{gpus}
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# --signal: five minutes before the time is up all processes save, and end with exit code 75. The
# same comes of a preemption with a grace time. --requeue: after a node has failed, too.
set -uo pipefail

cd "$SLURM_SUBMIT_DIR"
# Ours end by themselves when one of them does, with a sentence; srun is not to be quicker.
srun --kill-on-bad-exit=0 venv/bin/python -m jaxllm.train \
  @{arguments}
code=$?

# 0: finished. 75: saved, go on. 2: refused, and would be again. Else: one of them has failed, and
# the last checkpoint counts; five times, so that a fault of the run's own comes to an end.
if [ "$code" -eq 75 ] || { [ "$code" -ne 0 ] && [ "$code" -ne 2 ] \
    && [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
