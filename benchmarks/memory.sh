#!/usr/bin/env bash
# Runs within a budget for the whole process, one JSON file each.
#   benchmarks/memory.sh FOLDER [ROW...]     rows: P4 P6 P6q P7-24 P7-78 (default: the first three)
set -euo pipefail
out=$1; shift
mkdir -p "$out"
row() { # id shape method steps budget [flags]
  python3 -m lorakit bench --shape "$2" --method "$3" --steps "$4" --id "$1" \
    --set memory_limit="$5" --output "$out/memory_$1.json" "${@:6}" > "$out/memory_$1.log" 2>&1 \
    || { tail -n 30 "$out/memory_$1.log"; return 0; }
  python3 - "$out/memory_$1.json" <<'PY'
import json, sys
r = json.load(open(sys.argv[1]))
print(f"{r['id']:6} {r['tokens_per_second']:9,.0f} tok/s  allocated {r['peak_allocated_gib']:6.2f} GiB  "
      f"process {r['peak_process_gib']:6.2f} GiB  planned {r['planned_gib']:6.2f} GiB  host {r['peak_host_gib']:6.2f} GiB  {r['step_seconds']}")
PY
}
long() { # id tokens steps budget: one row of so many tokens is a step
  row "$1" llama-3.1-8b qlora "$3" "$4" --seq "$2" --micro-batch 1 --accumulation 1 --set lora_r=32
}
for id in "${@:-P4 P6 P6q}"; do
  for one in $id; do
    case $one in
      P4) row P4 llama-2-7b qlora 7 6.0GiB ;;
      P6) row P6 llama-2-7b lora 7 4.0GiB --set weight_offload=on ;;
      P6q) row P6q llama-2-7b qlora 7 3.0GiB --set weight_offload=on ;;
      P7-24) long P7-24 122880 2 23.5GiB ;;
      P7-78) long P7-78 344064 1 72GiB ;;
      *) echo "no row $one"; exit 2 ;;
    esac
  done
done
