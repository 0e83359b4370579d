"""A base model's files enter; a short record of them leaves, by which a changed base is noticed.

A weight file of up to 1 GiB is hashed whole, in half a second. Hashing all of a 7B model takes as
long as reading it, 13 GB: of a larger file the header (names, shapes, offsets) and 16 pieces of
64 KiB spread over it change whenever a model is trained further, merged or converted.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError
from lorakit.model.untrusted import read_object
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir, write_json

PIECES, PIECE_BYTES = 16, 2**16
WHOLE_BYTES = 2**30


def base_folder(recipe: Recipe, location: str) -> Path | None:
    """The folder on this disk with the base's files; None where a hub model is not cached whole."""
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            location,
            revision=recipe.revision or "main",
            local_files_only=True,
            allow_patterns=["*.json", "*.safetensors"],
        )
    except (OSError, ValueError):
        return None
    return Path(found)


def weights_fingerprint(folder: Path) -> dict[str, Any]:
    """Size and SHA-256 of each weight file, by name; of a large one it is sampled."""
    return {path.name: _record(path) for path in sorted(folder.glob("*.safetensors"))}


def remember_base(run: RunDir, recipe: Recipe, location: str) -> None:
    """Write `base.json`: what the adapter of this run will have been trained against."""
    folder = base_folder(recipe, location)
    if folder is not None:
        write_json(run.base, {"weights": weights_fingerprint(folder)})


def check_base(run: RunDir, recipe: Recipe, location: str) -> None:
    """Refuse a base that is not the one this run was trained on. Old runs hold no record of it.

    Raises:
        ModelError: a weight file is missing, new, or has other contents.
    """
    folder = base_folder(recipe, location)
    if folder is None or not run.base.exists():
        return
    before = read_object(run.base).get("weights")
    if not isinstance(before, dict):
        raise ModelError(f"{run.base}: names no weights", hint="bring it back from a copy")
    now = weights_fingerprint(folder)
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        raise ModelError(
            f"model: {recipe.model}: {changed[0]} is not the file this run was trained on "
            f"(see {run.base.name})",
            hint="an adapter fits its own base only: bring that base back, or train anew on this "
            "one",
        )


def _record(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > WHOLE_BYTES:
        return {"bytes": size, "sampled_sha256": _sampled(path)}
    with path.open("rb") as handle:
        return {"bytes": size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
        digest.update(handle.read(min(header, 2**26)))
        for piece in range(PIECES):
            handle.seek(max(0, (size - PIECE_BYTES) * piece // (PIECES - 1)))
            digest.update(handle.read(PIECE_BYTES))
    return digest.hexdigest()
