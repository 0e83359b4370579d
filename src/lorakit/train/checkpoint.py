"""Write, verify, load and rotate checkpoints, and save adapters.

A checkpoint such as step_000100 is written to a temporary folder, flushed, sealed by a manifest and
renamed (`storage/atomic_dir.py`). Loading restores the state bit by bit. Its files:

    adapter_model.safetensors, adapter_config.json   in PEFT's format, readable by any tool
    state.safetensors, state.json                    optimizer, schedule, scaler, generators
    trainer_state.json                               transformers' own counters

Pickles are neither written nor read.
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

# State, counters and configuration besides the tensors.
SMALL_FILES = 2**20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint: its folder, its step, and the facts of the run at that step."""

    folder: Path
    step: int
    facts: dict[str, Any]


def newest_intact(run: RunDir) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose manifest verifies, and a note for each newer one skipped."""
    notes: list[str] = []
    for folder in reversed(run.list_checkpoints()):
        try:
            return read_checkpoint(folder), notes
        except CorruptedError as fault:
            notes.append(f"{folder.name} is damaged ({fault}); trying an older one")
    return None, notes


def require_checkpoint(run: RunDir) -> tuple[Checkpoint | None, list[str]]:
    """Find the checkpoint to resume from; None if the run ended before its first one.

    Raises:
        RunError: checkpoints exist, but none is complete.
    """
    checkpoint, notes = newest_intact(run)
    if checkpoint is None and notes:
        raise RunError(
            f"{run.path}: no complete checkpoint to resume from"
            + "".join(f"\n  {note}" for note in notes),
            hint="restore one from a copy, or start over in a new folder: --output "
            "runs/NEW-NAME (nothing here was changed)",
        )
    return checkpoint, notes


def rotate(run: RunDir, keep: int, step: int, best: int | None = None) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, which was just saved, and `best`.

    Later ones did not verify when the run was resumed, so they are not counted.
    """
    past = [p for p in run.list_checkpoints() if checkpoint_step(p) <= step]
    for folder in past[:-keep]:
        if checkpoint_step(folder) != best:
            discard(folder)


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps done at a checkpoint folder."""
    return int(folder.name.split("_")[1])


def checkpoint_bytes(recipe: Recipe, trainable: int) -> int:
    """Bytes on disk of a checkpoint with `trainable` float32 parameters."""
    return int(trainable * (4 + OPTIMIZER_BYTES[recipe.optimizer])) + SMALL_FILES


def require_space(run: RunDir, recipe: Recipe, trainable: int) -> None:
    """Check before the first step that all checkpoints and the adapter fit on the disk.

    Raises:
        WorkError: the disk is too small; gives the missing space.
    """
    one = checkpoint_bytes(recipe, trainable)
    # A new one is written before the oldest is deleted.
    more = max(1, recipe.kept_checkpoints + 1 - len(run.list_checkpoints()))
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
        WorkError: the adapter holds NaN or infinity, or has not changed since the start.
    """
    _check_learned(model)
    with atomic_directory(folder) as temporary:
        save_adapter_files(model, temporary, with_embeddings)
        tokenizer.save_pretrained(temporary)
        _drop_local_keys(temporary / "tokenizer_config.json")


def save_adapter_files(model: Any, folder: Path, with_embeddings: bool) -> None:
    """Write only the adapter's weights and configuration, as in each checkpoint."""
    model.save_pretrained(folder, save_embedding_layers=with_embeddings)
    # PEFT's model card is an empty form that names the local folder of the base model.
    (folder / "README.md").unlink(missing_ok=True)
    # safetensors makes its files private to the user, regardless of the umask.
    (folder / ADAPTER_WEIGHTS).chmod((folder / "adapter_config.json").stat().st_mode & 0o777)


def saves_embeddings(recipe: Recipe) -> bool:
    """True if an embedding or head trains, so that its weights must be saved with the adapter."""
    names = (
        [recipe.target_modules] if isinstance(recipe.target_modules, str) else recipe.target_modules
    )
    return any(n in ("embed_tokens", "lm_head", "wte") for n in names)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint's manifest and read its facts.

    Raises:
        CorruptedError: a file is missing or differs from what was saved.
    """
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
    starts_at_zero = [p for n, p in trained.items() if "lora_B" in n or "lora_embedding_A" in n]
    if starts_at_zero and not any(bool(p.any()) for p in starts_at_zero):
        raise WorkError(
            "training changed nothing: every lora_B is still zero; the adapter was not saved",
            hint="raise learning_rate, or check for overflowing gradients (grad_norm inf)",
        )


TENSORS, VALUES = "state.safetensors", "state.json"


def save_state(folder: Path, optimizer: Any, scheduler: Any, scaler: Any, randoms: Any) -> None:
    """Write all training state except the adapter; `randoms` holds each process's generators."""
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
    # safetensors makes its files private to the user, regardless of the umask.
    (folder / TENSORS).chmod((folder / VALUES).stat().st_mode & 0o777)


def load_state(folder: Path) -> dict[str, Any]:
    """The values passed to `save_state`, by name; tensors on the CPU."""
    packed = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    values: dict[str, Any] = _unpack(packed, load_file(folder / TENSORS))
    return values


def load_adapter(model: Any, folder: Path) -> None:
    """Load an adapter's weights into a PEFT model built from the same settings.

    Raises:
        RunError: a trained tensor is missing in the file, or the file has an unexpected one.
    """
    from peft import set_peft_model_state_dict

    saved = load_file(folder / ADAPTER_WEIGHTS)
    try:
        result = set_peft_model_state_dict(model, saved)
    except (KeyError, RuntimeError) as error:
        raise _unfit(folder, str(error).splitlines()[-1].strip()) from error
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    unmatched = sorted(trained & set(result.missing_keys)) + sorted(result.unexpected_keys)
    if unmatched:
        raise _unfit(folder, f"first unmatched tensor: {unmatched[0]}")


def restore_schedule(scheduler: Any, optimizer: Any, values: Any) -> None:
    """Continue a schedule at its saved step with its present shape.

    An extended run uses the rates that the longer run has at these steps. transformers would use
    the saved rate for one more step, which is 0 after a finished cosine.
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
    """States of this process's generators: Python, NumPy, torch on the CPU and on each device."""
    numpy: Any = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [numpy[0], numpy[1].tolist(), *numpy[2:]],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def restore_random(values: dict[str, Any]) -> None:
    """Set the generators of this process; states of absent devices are ignored."""
    random.setstate(values["python"])
    np.random.set_state(tuple(values["numpy"]))
    torch.set_rng_state(values["torch"])
    if torch.cuda.is_available():
        for index, state in enumerate(values["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, index)
    if values["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(values["mps"])


def _pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Convert `value` to JSON, moving tensors to `tensors` by path; tuples are marked as such."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[k, _pack(v, tensors, f"{name}/{k}")] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        tag = "tuple" if isinstance(value, tuple) else "list"
        return {tag: [_pack(v, tensors, f"{name}/{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{name}: a {type(value).__name__} cannot be kept in a checkpoint")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    (tag, content), *_ = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "dict":
        return {k: _unpack(v, tensors) for k, v in content}
    values = [_unpack(v, tensors) for v in content]
    return tuple(values) if tag == "tuple" else values


def _unfit(folder: Path, mismatch: str) -> RunError:
    return RunError(
        f"{folder}: its adapter does not fit this recipe's model: {mismatch}",
        hint="use the model and the adapter settings that it was trained with",
    )
