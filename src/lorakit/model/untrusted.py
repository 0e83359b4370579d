"""A model's or an adapter's folder enters; nothing leaves, or the reason why it is not loaded.

What comes with a model was written by somebody else. Its config can name Python code to run, a
kernel to download, a size that no memory has; its tokenizer can name files outside the folder. All
of it is read here as plain JSON before a library acts on it.
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
# The largest of published models is far below each.
LARGEST = {
    "vocab_size": 2**22, "hidden_size": 2**17, "intermediate_size": 2**21, "head_dim": 2**16,
    "num_hidden_layers": 1000, "num_attention_heads": 2**12, "num_key_value_heads": 2**12,
    "max_position_embeddings": 2**30, "num_labels": 2**16, "num_experts": 2**14,
    "num_local_experts": 2**14, "n_layer": 1000, "n_head": 2**12, "n_embd": 2**17,
    "n_positions": 2**24,
}  # fmt: skip
# What transformers itself ships; anything else is a repository to fetch a kernel from.
BUILT_IN = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
BUILT_IN |= {"grouped_mm", "batched_mm"}
HARMLESS = {"_name_or_path", "_commit_hash"}
# As transformers 5 writes floats that JSON has no number for (limits of Mamba's time steps).
_NUMBERS = ("Infinity", "-Infinity", "NaN")
TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_KERNEL = re.compile(r"implementation|kernel")
_said: set[str] = set()


def check_config(values: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse a config that would run code, fetch a kernel or claim an absurd size.

    Raises:
        ModelError: names the key and what it holds.
    """
    for key, value in _pairs(values):
        if key in ("auto_map", "custom_pipelines") and value and not recipe.trust_remote_code:
            raise ModelError(
                f"model: {recipe.model}: its config.json asks to run Python code of its own "
                f"({key})",
                hint="read that code first; then set trust_remote_code: true",
            )
        text = isinstance(value, str)
        if key == "trust_remote_code" and value:
            raise _reaches_out(recipe, key, value)
        if text and _KERNEL.search(key) and value not in BUILT_IN and not recipe.trust_remote_code:
            raise _reaches_out(recipe, key, value)
        number = key == "__float__" and value in _NUMBERS
        inner = key.startswith("_") and key not in HARMLESS and not number
        if inner and (isinstance(value, list | dict) or (text and value not in BUILT_IN)):
            raise _reaches_out(recipe, key, value)
        if key in LARGEST and value is not None:
            _check_size(recipe, key, value)
        if key == "transformers_weights" and (not text or Path(value).name != value):
            raise _reaches_out(recipe, key, value)


def check_folder(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder whose config or tokenizer reaches out of it.

    Raises:
        ModelError: names the file and the key.
    """
    if not (folder / "config.json").exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"model: {recipe.model}: no config.json in this folder (found: {found})",
            hint="a model folder holds config.json, tokenizer.json and *.safetensors",
        )
    check_config(read_object(folder / "config.json"), recipe)


def check_tokenizer(folder: Path, recipe: Recipe) -> None:
    """Refuse a tokenizer that runs code, or whose files or templates lie elsewhere.

    Raises:
        ModelError: names the file and the key.
    """
    path = folder / "tokenizer_config.json"
    values = read_object(path) if path.exists() else {}
    if values.get("auto_map") and not recipe.trust_remote_code:
        raise ModelError(
            f"{path}: asks to run Python code of its own (auto_map)",
            hint="read that code first; then set trust_remote_code: true",
        )
    for key, value in values.items():
        if not key.endswith("_file") or not isinstance(value, str):
            continue
        place = (folder / value).resolve()
        # Paths of the author's machine stand in some published files, and lead nowhere here.
        if place.exists() and folder.resolve() not in place.parents:
            raise ModelError(
                f"{path}: {key} names {value!r}, which is outside the model's folder",
                hint="remove that key, if you trust this model otherwise",
            )
    named = values.get("chat_template")
    names = [part.get("name") for part in named] if isinstance(named, list) else []
    more = folder / "additional_chat_templates"
    names += [p.stem for p in more.iterdir()] if more.is_dir() else []
    for name in names:
        if not isinstance(name, str) or not TEMPLATE_NAME.fullmatch(name):
            raise ModelError(
                f"{path}: a chat template is named {str(name)[:60]!r}; names are letters, digits, "
                "_ and -, since they become names of files",
                hint="do not use this model: the name is made to write a file elsewhere",
            )


def check_adapter(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """The adapter's config, once it and the weights are found whole and harmless.

    Args:
        names: of all modules of the base, which its patterns will meet.

    Raises:
        ModelError: no LoRA adapter of peft, damaged, it names modules to import, or holds a
            pattern that would not end; or it is not what training saved.
    """
    path = folder / "adapter_config.json"
    values = read_object(path)
    if str(values.get("peft_type")).upper() != "LORA":
        raise ModelError(
            f"{path}: is no LoRA adapter (peft_type: {values.get('peft_type')!r})",
            hint="lorakit reads the LoRA adapters of peft",
        )
    for key in ("auto_mapping", "megatron_config"):
        if values.get(key):
            raise ModelError(
                f"{path}: {key} names Python modules to import; that is not done",
                hint="remove that key, if you trust this adapter otherwise",
            )
    check_settings(values, names, f"{path}: ", ModelError)
    read_header(folder / ADAPTER_WEIGHTS)
    try:
        intact(folder)
    except CorruptedError as trouble:
        raise ModelError(
            f"{folder}: {trouble}: it is not the adapter that training saved",
            hint="to have that again, delete this folder and start `lorakit train` on the run's "
            "recipe.yaml with --resume; to use it as it is, delete its MANIFEST.json",
        ) from trouble
    return values


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        ModelError: missing, too large, or no object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ModelError(f"{path}: more than {LARGEST_JSON // 2**20} MiB of settings")
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ModelError(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: a JSON object is expected (found: {type(values).__name__})")
    return values


def say_trust(recipe: Recipe) -> None:
    """Say aloud, once for each model, that code of strangers is about to run."""
    if recipe.trust_remote_code and recipe.model not in _said:
        _said.add(recipe.model)
        logging.getLogger("lorakit").warning(
            "warning: trust_remote_code: Python code that ships with %s runs on this machine, "
            "with all your rights",
            recipe.model,
        )


def _pairs(values: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """All keys with their values, of inner objects too: text_config, vision_config ..."""
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
        f"model: {recipe.model}: its config.json says {key}: {str(value)[:60]}, which no model has",
        hint=f"a whole number up to {LARGEST[key]:,} is expected",
    )


def _reaches_out(recipe: Recipe, key: str, value: Any) -> ModelError:
    return ModelError(
        f"model: {recipe.model}: its config.json sets {key}: {str(value)[:80]!r}, by which other "
        "code than transformers' own would be used",
        hint="remove that key from config.json, if you trust this model otherwise",
    )
