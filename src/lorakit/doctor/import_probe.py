"""Import the heavy packages one by one and print facts about each, one JSON object per line.

Run as `python -m lorakit.doctor.import_probe` in a subprocess: a package that crashes or hangs ends
only that process, and the lines before it are kept.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from lorakit.errors import first_line


def main() -> None:
    """Probe torch, then bitsandbytes, then triton."""
    for name, probe in (("torch", _torch), ("bitsandbytes", _bitsandbytes), ("triton", _triton)):
        try:
            facts = probe()
        except BaseException as error:  # any exception of a broken install is the result
            facts = {"error": f"{type(error).__name__}: {first_line(error)}"}
        sys.stdout.write(json.dumps({name: facts}) + "\n")
        sys.stdout.flush()


def _torch() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    facts["available"] = torch.cuda.is_available()
    if facts["available"]:
        facts["gpu"] = torch.cuda.get_device_name()
        facts["capability"] = list(torch.cuda.get_device_capability())
        facts["architectures"] = torch.cuda.get_arch_list()
        (torch.ones(2, device="cuda") + 1).sum().item()
    return facts


def _bitsandbytes() -> dict[str, Any]:
    import bitsandbytes
    import torch

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device_name in devices:
        weight = torch.zeros(64, 64, device=device_name)
        bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    return {"version": bitsandbytes.__version__, "works_on": devices}


def _triton() -> dict[str, Any]:
    import triton

    return {"version": triton.__version__}


if __name__ == "__main__":
    main()
