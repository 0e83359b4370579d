"""Peak memory of merging a 7B-shape model: random base and adapter on the disk, `lorakit export`.

    python benchmarks/export_memory.py --shape llama-2-7b [--method qlora] --output result.json

Needs about 28 GB of disk under --work; the base is written shard by shard.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

# The kernel's own high-water mark of that process. `ru_maxrss` of a child starts from the memory of
# its parent, which has just written a shard of 10 GB.
EXPORT = """
import atexit, sys
from lorakit.cli.main import main
atexit.register(lambda: print(open("/proc/self/status").read()))
main()
"""


def main() -> None:
    words = argparse.ArgumentParser()
    words.add_argument("--shape", default="llama-2-7b")
    words.add_argument("--method", default="lora")
    words.add_argument("--work", type=Path, default=None)
    words.add_argument("--output", type=Path, default=None)
    asked = words.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.work, prefix="export-memory-") as folder:
        result = measure(Path(folder), asked.shape, asked.method)
    text = json.dumps(result, indent=2) + "\n"
    sys.stdout.write(text)
    if asked.output:
        asked.output.write_text(text)


def measure(work: Path, shape: str, method: str) -> dict:
    base, run = work / "base", work / "run"
    size = write_base(base, shape)
    write_run(run, base, method)
    began = time.perf_counter()
    command = [sys.executable, "-c", EXPORT, "export", str(run), "--to", "merged"]
    command += ["--no-verify", "--dtype", "bfloat16"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - began
    peak = int(done.stdout.split("VmHWM:")[1].split()[0]) * 1024
    from importlib.metadata import version

    return {
        "what": "lorakit export --to merged --no-verify",
        "shape": shape,
        "method": method,
        "base_bytes": size,
        "peak_rss_bytes": peak,
        "peak_rss_gb": round(peak / 1e9, 2),
        "seconds": round(seconds, 1),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "peft": version("peft"),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_base(folder: Path, shape: str) -> int:
    from transformers import AutoModelForCausalLM

    from lorakit.model.safetensors_io import write_shards
    from lorakit.planning.known_models import shape_config

    config = shape_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)

    def make(shape: torch.Size) -> torch.Tensor:
        return (torch.randn(shape, dtype=torch.float32) * 0.02).to(torch.bfloat16)

    entries = [
        (name, value.numel() * 2, partial(make, value.shape))
        for name, value in model.state_dict().items()
    ]
    # Two large shards, as Llama-2-7B has on the hub.
    write_shards(folder, entries, limit=10**10)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_run(folder: Path, base: Path, method: str) -> None:
    from peft import get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lorakit.model.demo_model import demo_model_dir
    from lorakit.model.load import load_config
    from lorakit.model.lora_config import lora_config, resolve_targets
    from lorakit.recipe.loader import load_recipe

    flags = {"model": str(base), "data": "none", "method": method, "dtype": "bfloat16"}
    resolved = load_recipe(None, [], flags)
    config = load_config(resolved.recipe, str(base))
    resolved = resolve_targets(resolved, config)
    with torch.device("meta"):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config),
            lora_config(resolved.recipe),
            low_cpu_mem_usage=True,
        )
    tensors = {
        name.replace(".default", ""): torch.randn(p.shape) * 0.01
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    (folder / "adapter").mkdir(parents=True)
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    model.peft_config["default"].save_pretrained(folder / "adapter")
    AutoTokenizer.from_pretrained(demo_model_dir()).save_pretrained(folder / "adapter")
    (folder / "recipe.yaml").write_text(resolved.to_yaml())


if __name__ == "__main__":
    main()
