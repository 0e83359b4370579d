"""Fingerprint of a base model's weight files, to detect a base that changed after training.

A weight file of up to 1 GiB is hashed completely, in half a second. Hashing all of a 7B model takes
as long as reading it, 13 GB. Of a larger file the header (names, shapes, offsets) and 16 evenly
spaced samples of 64 KiB are hashed: they change whenever a model is trained further, merged or
converted.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError
from lorakit.model.untrusted import read_object
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir, write_json

SAMPLES, SAMPLE_BYTES = 16, 2**16
FULL_HASH_BYTES = 2**30


def base_folder(recipe: Recipe, location: str) -> Path | None:
    """Local folder with the base's files; None if a hub model is not completely cached."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            location,
            revision=recipe.revision or "main",
            local_files_only=True,
            allow_patterns=["*.json", "*.safetensors"],
        )
    except (OSError, ValueError):
        return None
    return Path(folder)


def weights_fingerprint(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of each weight file, by name; the hash of a large file is sampled."""
    return {path.name: _record(path) for path in sorted(folder.glob("*.safetensors"))}


def remember_base(run: RunDir, recipe: Recipe, location: str) -> None:
    """Write `base.json`, the fingerprint of the base that this run trains on."""
    folder = base_folder(recipe, location)
    if folder is not None:
        write_json(run.base, {"weights": weights_fingerprint(folder)})


def check_base(run: RunDir, recipe: Recipe, location: str) -> None:
    """Refuse a base other than the one this run was trained on; skip runs without a record.

    Raises:
        ModelError: a weight file was added, removed or changed.
    """
    folder = base_folder(recipe, location)
    if folder is None or not run.base.exists():
        return
    before = read_object(run.base).get("weights")
    if not isinstance(before, dict):
        raise ModelError(f"{run.base}: has no `weights`", hint="restore it from a copy")
    now = weights_fingerprint(folder)
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise ModelError(
            f"model: {recipe.model}: {changed[0]} is not the file this run was trained on "
            f"(see {run.base.name})",
            hint="restore the base this adapter was trained on, or train a new one on this base",
        )


def _record(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > FULL_HASH_BYTES:
        return {"bytes": size, "sampled_sha256": _sampled(path)}
    with path.open("rb") as handle:
        return {"bytes": size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        header_bytes = int.from_bytes(handle.read(8), "little")
        digest.update(handle.read(min(header_bytes, 2**26)))
        for sample in range(SAMPLES):
            handle.seek(max(0, (size - SAMPLE_BYTES) * sample // (SAMPLES - 1)))
            digest.update(handle.read(SAMPLE_BYTES))
    return digest.hexdigest()
