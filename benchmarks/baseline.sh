#!/usr/bin/env bash
# The seed's two recipes at the Llama-2-7B shape, with and without recomputation, one JSON file each.
#   benchmarks/baseline.sh FOLDER [extra `lorakit bench` flags]
set -euo pipefail
out=$1; shift
mkdir -p "$out"
row() { # id method checkpointing
  python3 -m lorakit bench --shape llama-2-7b --method "$2" --steps "${STEPS:-8}" --id "$1" \
    --set gradient_checkpointing="$3" --output "$out/baseline_$1.json" "${@:4}" > "$out/baseline_$1.log" 2>&1 \
    || { tail -n 30 "$out/baseline_$1.log"; return 1; }
  python3 - "$out/baseline_$1.json" <<'PY'
import json, sys
r = json.load(open(sys.argv[1]))
print(f"{r['id']:24} {r['tokens_per_second']:9,.0f} tok/s  allocated {r['peak_allocated_gib']:6.2f} GiB  "
      f"process {r['peak_process_gib']:6.2f} GiB  planned {r['planned_gib']:6.2f} GiB")
PY
}
row lora lora false "$@"
row lora-recompute lora true "$@"
row qlora qlora false "$@"
row qlora-recompute qlora true "$@"
