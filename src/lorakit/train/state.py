"""A trainer enters; the files of a checkpoint leave, and the other way round, to the bit.

    adapter_model.safetensors, adapter_config.json   as PEFT writes them: any tool loads them
    state.safetensors, state.json                    optimizer, schedule, scaler, generators
    trainer_state.json                               transformers' own counters

No pickle is written, so none is ever read.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.errors import RunError
from lorakit.run_dir import ADAPTER_WEIGHTS

TENSORS, VALUES = "state.safetensors", "state.json"


def save_state(folder: Path, optimizer: Any, scheduler: Any, scaler: Any, randoms: Any) -> None:
    """Write everything but the adapter; `randoms` holds the generators of each process."""
    tensors: dict[str, Tensor] = {}
    values = {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "random": randoms,
    }
    packed = _pack(values, tensors, "")
    save_file(tensors, folder / TENSORS)
    (folder / VALUES).write_text(json.dumps(packed) + "\n", encoding="utf-8")
    # safetensors makes its files private to the user, whatever the umask says.
    (folder / TENSORS).chmod((folder / VALUES).stat().st_mode & 0o777)


def load_state(folder: Path) -> dict[str, Any]:
    """What `save_state` was given, by name; tensors on the CPU."""
    packed = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    values: dict[str, Any] = _unpack(packed, load_file(folder / TENSORS))
    return values


def load_adapter(model: Any, folder: Path) -> None:
    """Put a checkpoint's adapter into a PEFT model that was built by the same recipe.

    Raises:
        RunError: a trained tensor is not in the file, or the file holds one that nothing takes.
    """
    from peft import set_peft_model_state_dict

    saved = load_file(folder / ADAPTER_WEIGHTS)
    try:
        result = set_peft_model_state_dict(model, saved)
    except (KeyError, RuntimeError) as error:
        raise _unfit(folder, str(error).splitlines()[-1].strip()) from error
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    lost = sorted(trained & set(result.missing_keys)) + sorted(result.unexpected_keys)
    if lost:
        raise _unfit(folder, f"first tensor without its partner: {lost[0]}")


def restore_schedule(scheduler: Any, optimizer: Any, values: Any) -> None:
    """Go on with a schedule at its saved step, by the shape that it has now.

    A run that is extended takes the rates that the longer run has at these steps. transformers
    takes the saved rate for one step more: 0 after a finished cosine.
    """
    scheduler.load_state_dict(values)
    rates = [
        base * shape(scheduler.last_epoch)
        for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def random_state() -> dict[str, Any]:
    """The generators of this process: Python, NumPy, torch on the CPU and on each device."""
    numpy: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_random(values: dict[str, Any]) -> None:
    """Set the generators of this process; devices that are not there now are left out."""
    random.setstate(values["python"])
    np.random.set_state(tuple(values["numpy"]))
    torch.set_rng_state(values["torch"])
    if torch.cuda.is_available():
        for number, state in enumerate(values["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, number)
    if values["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(values["mps"])


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """`value` as JSON; its tensors go into `tensors` under their path. Tuples stay tuples."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _pack(v, tensors, f"{name}/{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(v, tensors, f"{name}/{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be kept in a checkpoint")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (kind, content), *_ = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in content}
    values = [_unpack(v, tensors) for v in content]
    return tuple(values) if kind == "tuple" else values


def _unfit(folder: Path, what: str) -> RunError:
    return RunError(
        f"{folder}: its adapter does not fit this recipe's model: {what}",
        hint="resume with the model and recipe of the run, or start anew with --output",
    )
