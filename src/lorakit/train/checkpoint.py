"""A training state enters; a whole checkpoint folder, or none, leaves. Also finds the newest one.

A checkpoint is written aside, every file is flushed, a manifest with checksums comes last, and one
rename makes it visible: a folder named step_000100 is always complete. Rotation runs afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lorakit.errors import RunError, WorkError
from lorakit.run_dir import ADAPTER_WEIGHTS, RunDir

MANIFEST = "MANIFEST.json"


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder to fill that becomes `target` on success and vanishes on failure.

    Raises:
        WorkError: the disk is full or cannot be written; `target` is then as it was before.
    """
    aside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        _remove_stale(target)
        aside.mkdir(parents=True)
        yield aside
        _seal(aside)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        _flush(target.parent)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not _is_disk_trouble(error, target):
            raise
        free = shutil.disk_usage(_existing(target)).free / 1e6
        raise WorkError(
            f"cannot write {target}: {str(error).splitlines()[0]} ({free:.0f} MB free)",
            hint="free some space, then go on with --resume; nothing half-written was left",
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def rotate(run: RunDir, keep: int) -> None:
    """Delete all but the newest `keep` finished checkpoints."""
    for folder in run.list_checkpoints()[:-keep]:
        shutil.rmtree(folder, ignore_errors=True)


def newest_whole(run: RunDir) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose manifest verifies, and a line for each one passed over."""
    notes: list[str] = []
    for folder in reversed(run.list_checkpoints()):
        trouble = _damage(folder)
        if trouble is None:
            return folder, notes
        notes.append(f"{folder.name} is damaged ({trouble}); trying an older one")
    return None, notes


def save_adapter(model: Any, tokenizer: Any, folder: Path, with_embeddings: bool) -> None:
    """Write the adapter in PEFT's format, with the tokenizer and chat template it was trained on.

    Raises:
        WorkError: the adapter holds NaN or infinity, or never moved from its start.
    """
    _check_learned(model)
    with staged(folder) as aside:
        _save_adapter_files(model, aside, with_embeddings)
        tokenizer.save_pretrained(aside)
        for name in ("tokenizer_config.json",):
            _drop_local_keys(aside / name)


def save_training_state(model: Any, folder: Path, with_embeddings: bool) -> None:
    """The adapter part of a checkpoint; optimizer and RNG are added by the trainer."""
    _save_adapter_files(model, folder, with_embeddings)


def _save_adapter_files(model: Any, folder: Path, with_embeddings: bool) -> None:
    model.save_pretrained(folder, save_embedding_layers=with_embeddings)
    # peft's card is a form to fill in that names the local folder of the base model.
    (folder / "README.md").unlink(missing_ok=True)
    (folder / ADAPTER_WEIGHTS).chmod(0o644)


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


def _seal(folder: Path) -> None:
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as handle:
            sums[str(path.relative_to(folder))] = hashlib.file_digest(handle, "sha256").hexdigest()
            os.fsync(handle.fileno())
    (folder / MANIFEST).write_text(json.dumps({"sha256": sums}, indent=1) + "\n")
    _flush(folder / MANIFEST)
    _flush(folder)


def _damage(folder: Path) -> str | None:
    manifest = folder / MANIFEST
    try:
        sums = json.loads(manifest.read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        with path.open("rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != expected:
                return f"{name} was changed"
    return None


def require_checkpoint(run: RunDir) -> tuple[Path, list[str]]:
    """The checkpoint to resume from.

    Raises:
        RunError: the run has none that is whole.
    """
    found, notes = newest_whole(run)
    if found is None:
        raise RunError(
            f"{run.path}: no whole checkpoint to resume from" + "".join(f"\n  {n}" for n in notes),
            hint="start over in a new folder: --output runs/NEW-NAME",
        )
    return found, notes


def _remove_stale(target: Path) -> None:
    for old in target.parent.glob(f".{target.name}.tmp-*") if target.parent.exists() else ():
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _is_disk_trouble(error: BaseException, target: Path) -> bool:
    if isinstance(error, OSError):
        return True
    text = str(error).lower()
    # What torch's zip writer and safetensors say when the system refuses bytes.
    words = ("no space", "writ", "i/o", "os error", "file too large", "iostream", "unexpected pos")
    wrote = any(word in text for word in words)
    return wrote or shutil.disk_usage(_existing(target)).free < 1_000_000


def checkpoint_step(folder: Path) -> int:
    """Optimizer steps behind a checkpoint folder."""
    return int(folder.name.split("_")[1])
