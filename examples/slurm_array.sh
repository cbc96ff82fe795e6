#!/bin/bash
# Dump a teacher's answers as a Slurm job array: one part a job, at once or one after the other, on any nodes that share the folder.
#
# From the repository's root, with its environment active:
#
#   sbatch examples/slurm_array.sh configs/digits.yaml runs/digits/teacher-0 runs/digits/cache.zarr
#
# What has failed or was killed is submitted again, part by part; each writes only what is missing. `inspect` prints nothing when no
# part is left:
#
#   sbatch --array="$(python cli.py inspect runs/digits/cache.zarr --parts 64)" examples/slurm_array.sh …
#
#SBATCH --job-name=dump
#SBATCH --array=1-64
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail

# Of 64, not of SLURM_ARRAY_TASK_COUNT, which is smaller when some parts are submitted again.
exec python cli.py dump-logits --config "$1" --teacher "$2" --out "$3" "${@:4}" --part "$SLURM_ARRAY_TASK_ID/64"
