#!/usr/bin/env bash
# cloud/hf_jobs.sh OWNER/NAME MODEL DATA [key=value ...]
# Trains on a GPU of Hugging Face Jobs and uploads the adapter to OWNER/NAME.
# DATA is a dataset on the hub; for a local file: hf upload OWNER/DATA my.jsonl --repo-type dataset.
set -euo pipefail

repo=$1 model=$2 data=$3
shift 3
settings=()
for pair in "$@"; do
  settings+=(--set "$pair")
done
printf -v training '%q ' lorakit train --model "$model" --data "$data" --output run "${settings[@]}"
printf -v upload '%q ' lorakit export run --to hub --repo "$repo"
exec hf jobs run --flavor "${FLAVOR:-l4x1}" --timeout 12h --secrets HF_TOKEN \
  pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime \
  bash -c "pip install -q lorakit && $training && $upload"
