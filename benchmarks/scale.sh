#!/usr/bin/env bash
# One GPU against several on the same machine, one JSON file each: the same step, divided.
#   benchmarks/scale.sh FOLDER GPUS [ROW...]     rows: lora qlora 70b (default: the first two)
# 70b: Llama-3.3-70B's shape, QLoRA r16, within 24 GiB a card, its base spread over the cards.
set -euo pipefail
out=$1; gpus=$2; shift 2
mkdir -p "$out"
row() { # id gpus shape method [flags]
  python3 -m lorakit bench --id "$1" --gpus "$2" --shape "$3" --method "$4" \
    --output "$out/scale_$1.json" "${@:5}" > "$out/scale_$1.log" 2>&1 \
    || { tail -n 30 "$out/scale_$1.log"; return 0; }
  python3 - "$out/scale_$1.json" <<'PY'
import json, sys
r = json.load(open(sys.argv[1]))
print(f"{r['id']:10} {r['gpus']} GPUs {r['tokens_per_second']:9,.0f} tok/s  process {r['peak_process_gib']:6.2f} GiB  "
      f"planned {r['planned_gib']:6.2f} GiB  host {r['peak_host_gib']:6.2f} GiB  {r['step_seconds']}")
PY
}
for id in ${*:-lora qlora}; do
  case $id in
    lora) for n in 1 "$gpus"; do row "lora-$n" "$n" llama-2-7b lora --steps 12; done ;;
    qlora) for n in 1 "$gpus"; do row "qlora-$n" "$n" llama-2-7b qlora --steps 10; done ;;
    70b) row "70b-$gpus" "$gpus" llama-3.3-70b qlora --steps 4 --micro-batch 1 --accumulation 16 \
           --set lora_r=16 --set memory_limit=24GiB --set weight_offload=off ;;
    *) echo "no row $id"; exit 2 ;;
  esac
done
