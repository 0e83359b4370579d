"""A run directory enters; its newest whole checkpoint leaves. Also saves adapters, and makes room.

A folder named step_000100 was written aside, flushed, sealed by a manifest and renamed
(`storage/atomic_dir.py`); `train/checkpoint.py` says what lies in it.

A trainer enters; the files of a checkpoint leave, and the other way round, to the bit.

    adapter_model.safetensors, adapter_config.json   as PEFT writes them: any tool loads them
    state.safetensors, state.json                    optimizer, schedule, scaler, generators
    trainer_state.json                               transformers' own counters

No pickle is written, so none is ever read.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorakit.errors import RunError, WorkError
from lorakit.recipe.schema import Recipe
from lorakit.storage.atomic_dir import (
    CorruptedError,
    atomic_directory,
    discard,
    free_bytes,
    megabytes,
    verified,
)
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir
from lorakit.types import OPTIMIZER_BYTES

# State, counters and configuration beside the tensors.
SMALL_FILES = 2**20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint: its folder, the step it was taken after, and the run's facts then."""

    folder: Path
    step: int
    facts: dict[str, Any]


def newest_whole(run: RunDir) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose manifest verifies, and a line for each one passed over."""
    notes: list[str] = []
    for folder in reversed(run.list_checkpoints()):
        try:
            return _read(folder), notes
        except CorruptedError as trouble:
            notes.append(f"{folder.name} is damaged ({trouble}); trying an older one")
    return None, notes


def require_checkpoint(run: RunDir) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from; None where the run had not come to its first one.

    Raises:
        RunError: there are some, and none is whole.
    """
    found, notes = newest_whole(run)
    if found is None and notes:
        raise RunError(
            f"{run.path}: no whole checkpoint to resume from" + "".join(f"\n  {n}" for n in notes),
            hint="bring one back from a copy, or start over in a new folder: --output "
            "runs/NEW-NAME (nothing here was touched)",
        )
    return found, notes


def rotate(run: RunDir, keep: int, step: int) -> None:
    """After step `step` was saved, delete all but the newest `keep` checkpoints up to it.

    Those beyond it did not verify when the run was resumed: they count for nothing.
    """
    past = [p for p in run.list_checkpoints() if checkpoint_step(p) <= step]
    for folder in past[:-keep]:
        discard(folder)


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps behind a checkpoint folder."""
    return int(folder.name.split("_")[1])


def checkpoint_bytes(recipe: Recipe, trainable: int) -> int:
    """What a checkpoint of `trainable` float32 parameters takes on the disk."""
    return int(trainable * (4 + OPTIMIZER_BYTES[recipe.optimizer])) + SMALL_FILES


def require_space(run: RunDir, recipe: Recipe, trainable: int) -> None:
    """See before the first step that all checkpoints and the adapter will find room.

    Raises:
        WorkError: says how much is missing.
    """
    one = checkpoint_bytes(recipe, trainable)
    # One more is written before the oldest goes.
    more = max(1, recipe.keep_checkpoints + 1 - len(run.list_checkpoints()))
    needs, free = more * one + trainable * 4 + SMALL_FILES, free_bytes(run.path)
    if free < needs:
        raise WorkError(
            f"{run.path}: too little space: {more} more checkpoint{'s' * (more > 1)} of "
            f"{megabytes(one)} and the adapter take {megabytes(needs)}, {megabytes(free)} free, "
            f"{megabytes(needs - free)} missing",
            hint="free some space, choose another disk with --output, or keep fewer: "
            "--set keep_checkpoints=1",
        )


def save_adapter(model: Any, tokenizer: Any, folder: Path, with_embeddings: bool) -> None:
    """Write the adapter in PEFT's format, with the tokenizer and chat template it was trained on.

    Raises:
        WorkError: the adapter holds NaN or infinity, or never moved from its start.
    """
    _check_learned(model)
    with atomic_directory(folder) as aside:
        save_adapter_files(model, aside, with_embeddings)
        tokenizer.save_pretrained(aside)
        _drop_local_keys(aside / "tokenizer_config.json")


def save_adapter_files(model: Any, folder: Path, with_embeddings: bool) -> None:
    """The adapter's weights and configuration alone, as they lie in each checkpoint too."""
    model.save_pretrained(folder, save_embedding_layers=with_embeddings)
    # peft's card is a form to fill in that names the local folder of the base model.
    (folder / "README.md").unlink(missing_ok=True)
    # safetensors makes its files private to the user, whatever the umask says.
    (folder / ADAPTER_WEIGHTS).chmod((folder / "adapter_config.json").stat().st_mode & 0o777)


def saves_embeddings(recipe: Recipe) -> bool:
    """True when an embedding or head trains, so that its weights must travel with the adapter."""
    names = (
        [recipe.target_modules] if isinstance(recipe.target_modules, str) else recipe.target_modules
    )
    return any(n in ("embed_tokens", "lm_head", "wte") for n in names)


def _read(folder: Path) -> Checkpoint:
    facts, step = verified(folder), checkpoint_step(folder)
    if facts.get("step") != step:
        raise CorruptedError(f"it was saved after step {facts.get('step')}")
    return Checkpoint(folder, step, facts)


def _drop_local_keys(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        values.pop(key, None)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_learned(model: Any) -> None:
    import torch

    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if not torch.isfinite(parameter).all():
            raise WorkError(
                f"the adapter holds NaN or infinity ({name}); it was not saved",
                hint="lower learning_rate, or resume from the last checkpoint",
            )
    starts_at_zero = [p for n, p in trained.items() if "lora_B" in n]
    if starts_at_zero and not any(bool(p.any()) for p in starts_at_zero):
        raise WorkError(
            "training changed nothing: every lora_B is still zero; the adapter was not saved",
            hint="is learning_rate too small, or did the gradients overflow (grad_norm inf)?",
        )


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
