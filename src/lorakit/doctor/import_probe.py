"""Import the heavy packages one by one and print what each says of itself, one JSON object a line.

Run as `python -m lorakit.doctor.import_probe` in a process of its own: a package that crashes or
hangs takes only this process along, and the lines before it are kept.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main() -> None:
    """Ask torch, then bitsandbytes, then triton."""
    for name, ask in (("torch", _torch), ("bitsandbytes", _bitsandbytes), ("triton", _triton)):
        try:
            answer = ask()
        except BaseException as error:  # whatever a broken install raises is the finding
            lines = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]}
        sys.stdout.write(json.dumps({name: answer}) + "\n")
        sys.stdout.flush()


def _torch() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"version": torch.__version__, "cuda": torch.version.cuda}
    found["available"] = torch.cuda.is_available()
    if found["available"]:
        found["card"] = torch.cuda.get_device_name()
        found["capability"] = list(torch.cuda.get_device_capability())
        found["architectures"] = torch.cuda.get_arch_list()
        (torch.ones(2, device="cuda") + 1).sum().item()
    return found


def _bitsandbytes() -> dict[str, Any]:
    import bitsandbytes
    import torch

    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for kind in kinds:
        weight = torch.zeros(64, 64, device=kind)
        bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4")
    return {"version": bitsandbytes.__version__, "works_on": kinds}


def _triton() -> dict[str, Any]:
    import triton

    return {"version": triton.__version__}


if __name__ == "__main__":
    main()
