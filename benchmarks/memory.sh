#!/usr/bin/env bash
# Runs within a budget for the whole process, Llama-2-7B shape, one JSON file each.
#   benchmarks/memory.sh FOLDER [ROW...]     rows: P4 P6 P6q (default: all)
set -euo pipefail
out=$1; shift
mkdir -p "$out"
row() { # id method budget [flags]
  python3 -m lorakit bench --shape llama-2-7b --method "$2" --steps "${STEPS:-7}" --id "$1" \
    --set memory_limit="$3" --output "$out/memory_$1.json" "${@:4}" > "$out/memory_$1.log" 2>&1 \
    || { tail -n 30 "$out/memory_$1.log"; return 0; }
  python3 - "$out/memory_$1.json" <<'PY'
import json, sys
r = json.load(open(sys.argv[1]))
print(f"{r['id']:6} {r['tokens_per_second']:9,.0f} tok/s  allocated {r['peak_allocated_gib']:6.2f} GiB  "
      f"process {r['peak_process_gib']:6.2f} GiB  planned {r['planned_gib']:6.2f} GiB  {r['step_seconds']}")
PY
}
for id in "${@:-P4 P6 P6q}"; do
  for one in $id; do
    case $one in
      P4) row P4 qlora 6.0GiB ;;
      P6) row P6 lora 4.0GiB --set streaming=on ;;
      P6q) row P6q qlora 3.0GiB --set streaming=on ;;
      *) echo "no row $one"; exit 2 ;;
    esac
  done
done
