"""A run directory enters; its newest whole checkpoint leaves. Also saves adapters, and makes room.

A folder named step_000100 was written aside, flushed, sealed by a manifest and renamed
(`durable.py`); `state.py` says what lies in it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.durable import Damaged, discard, free_bytes, megabytes, staged, verified
from lorakit.errors import RunError, WorkError
from lorakit.memory import OPTIMIZER_BYTES
from lorakit.recipe import Recipe
from lorakit.run_dir import ADAPTER_WEIGHTS, RunDir

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
        except Damaged as trouble:
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
    with staged(folder) as aside:
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
        raise Damaged(f"it was saved after step {facts.get('step')}")
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
