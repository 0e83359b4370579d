"""Check a model's or an adapter's files before any library loads them.

A model's files come from an untrusted author. Its config can name Python code to run, a kernel to
download, or a size that fits no memory; its tokenizer can name files outside the folder. They are
read here as plain JSON before a library acts on them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError
from lorakit.model.regex_limits import check_settings
from lorakit.model.safetensors_io import read_header
from lorakit.recipe.schema import Recipe
from lorakit.storage.atomic_dir import CorruptedError, intact
from lorakit.storage.run_dir import ADAPTER_WEIGHTS

LARGEST_JSON = 64 * 2**20  # tokenizer_config.json of 250,000 added tokens takes 40 MB
# Limits far above the largest published models.
LARGEST = {
    "vocab_size": 2**22, "hidden_size": 2**17, "intermediate_size": 2**21, "head_dim": 2**16,
    "num_hidden_layers": 1000, "num_attention_heads": 2**12, "num_key_value_heads": 2**12,
    "max_position_embeddings": 2**30, "num_labels": 2**16, "num_experts": 2**14,
    "num_local_experts": 2**14, "n_layer": 1000, "n_head": 2**12, "n_embd": 2**17,
    "n_positions": 2**24,
}  # fmt: skip
# Implementations that transformers ships; other names are repositories to fetch a kernel from.
BUILT_IN = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
BUILT_IN |= {"grouped_mm", "batched_mm"}
HARMLESS = {"_name_or_path", "_commit_hash"}
# How transformers 5 writes floats that JSON lacks (limits of Mamba's time steps).
_FLOAT_NAMES = ("Infinity", "-Infinity", "NaN")
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KERNEL = re.compile(r"implementation|kernel")
_warned: set[str] = set()


def check_config(values: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse a config that would run code, fetch a kernel or claim an absurd size.

    Raises:
        ModelError: names the key and its value.
    """
    for key, value in _pairs(values):
        if key in ("auto_map", "custom_pipelines") and value and not recipe.trust_remote_code:
            raise ModelError(
                f"model: {recipe.model}: config.json asks to run its own Python code ({key})",
                hint="read that code first; then set trust_remote_code: true",
            )
        text = isinstance(value, str)
        if key == "trust_remote_code" and value:
            raise _outside_code(recipe, key, value)
        if text and _KERNEL.search(key) and value not in BUILT_IN and not recipe.trust_remote_code:
            raise _outside_code(recipe, key, value)
        number = key == "__float__" and value in _FLOAT_NAMES
        private = key.startswith("_") and key not in HARMLESS and not number
        if private and (isinstance(value, list | dict) or (text and value not in BUILT_IN)):
            raise _outside_code(recipe, key, value)
        if key in LARGEST and value is not None:
            _check_size(recipe, key, value)
        if key == "transformers_weights" and (not text or Path(value).name != value):
            raise _outside_code(recipe, key, value)


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder without config.json, or with a harmful one (`check_config`).

    Raises:
        ModelError: names the file or the key.
    """
    if not (folder / "config.json").exists():
        names = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"model: {recipe.model}: no config.json in this folder (found: {names})",
            hint="a model folder holds config.json, tokenizer.json and *.safetensors",
        )
    check_config(read_object(folder / "config.json"), recipe)


def check_tokenizer(folder: Path, recipe: Recipe) -> None:
    """Refuse a tokenizer that runs code or names files or templates outside its folder.

    Raises:
        ModelError: names the file and the key.
    """
    path = folder / "tokenizer_config.json"
    values = read_object(path) if path.exists() else {}
    if values.get("auto_map") and not recipe.trust_remote_code:
        raise ModelError(
            f"{path}: asks to run its own Python code (auto_map)",
            hint="read that code first; then set trust_remote_code: true",
        )
    for key, value in values.items():
        if not key.endswith("_file") or not isinstance(value, str):
            continue
        target = (folder / value).resolve()
        # Some published files contain paths of the author's machine, which do not exist here.
        if target.exists() and folder.resolve() not in target.parents:
            raise ModelError(
                f"{path}: {key} names {value!r}, which is outside the model's folder",
                hint="remove that key if you otherwise trust this model",
            )
    templates = values.get("chat_template")
    names = [template.get("name") for template in templates] if isinstance(templates, list) else []
    folder_templates = folder / "additional_chat_templates"
    names += [p.stem for p in folder_templates.iterdir()] if folder_templates.is_dir() else []
    for name in names:
        if not isinstance(name, str) or not TEMPLATE_NAME.fullmatch(name):
            raise ModelError(
                f"{path}: a chat template is named {str(name)[:60]!r}, expected letters, digits, "
                "_ and - (names become file names)",
                hint="do not use this model: this name would write a file outside its folder",
            )


def check_adapter(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Check an adapter's config and weights, and return the config.

    Args:
        names: names of all modules of the base, which its patterns will match.

    Raises:
        ModelError: the adapter is not a LoRA adapter of peft, is damaged, names modules to import,
            holds a pattern that takes too long, or differs from what training saved.
    """
    path = folder / "adapter_config.json"
    values = read_object(path)
    if str(values.get("peft_type")).upper() != "LORA":
        raise ModelError(
            f"{path}: peft_type is {values.get('peft_type')!r}, expected 'LORA'",
            hint="lorakit reads the LoRA adapters of peft",
        )
    for key in ("auto_mapping", "megatron_config"):
        if values.get(key):
            raise ModelError(
                f"{path}: {key} names Python modules to import, which is not allowed",
                hint="remove that key if you otherwise trust this adapter",
            )
    check_settings(values, names, f"{path}: ", ModelError)
    read_header(folder / ADAPTER_WEIGHTS)
    try:
        intact(folder)
    except CorruptedError as fault:
        raise ModelError(
            f"{folder}: differs from the adapter that training saved: {fault}",
            hint="to restore it, delete this folder and run `lorakit train` with the run's "
            "recipe.yaml and --resume; to use it as it is, delete its MANIFEST.json",
        ) from fault
    return values


def read_object(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file.

    Raises:
        ModelError: the file is missing, too large, or not a JSON object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ModelError(f"{path}: larger than {LARGEST_JSON // 2**20} MiB")
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ModelError(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: {type(values).__name__}, expected a JSON object")
    return values


def warn_remote_code(recipe: Recipe) -> None:
    """Warn, once for each model, that its Python code will run."""
    if recipe.trust_remote_code and recipe.model not in _warned:
        _warned.add(recipe.model)
        logging.getLogger("lorakit").warning(
            "warning: trust_remote_code: Python code that ships with %s runs on this machine, "
            "with all your rights",
            recipe.model,
        )


def _pairs(values: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield all (key, value) pairs, also of nested objects such as text_config."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield str(key), value
            yield from _pairs(value, depth + 1)
    elif isinstance(values, list):
        for value in values[:1000]:
            yield from _pairs(value, depth + 1)


def _check_size(recipe: Recipe, key: str, value: Any) -> None:
    numbers = value if isinstance(value, list) else [value]
    if all(type(n) is int and 0 <= n <= LARGEST[key] for n in numbers):
        return
    raise ModelError(
        f"model: {recipe.model}: config.json sets {key}: {str(value)[:60]}, "
        f"expected at most {LARGEST[key]:,}",
        hint="restore config.json from the model's source",
    )


def _outside_code(recipe: Recipe, key: str, value: Any) -> ModelError:
    return ModelError(
        f"model: {recipe.model}: config.json sets {key}: {str(value)[:80]!r}, which would load "
        "code from outside transformers",
        hint="remove that key from config.json if you otherwise trust this model",
    )
