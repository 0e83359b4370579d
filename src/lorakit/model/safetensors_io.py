"""Read and write safetensors files, one tensor or shard in memory at a time.

Only safetensors are read: a pickle (.bin, .pt, .pth, .ckpt) is a program that runs when it is
loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError, first_line

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
# Peak memory of an export is about one shard and one tensor in float32.
SHARD_BYTES = 2 * 10**9


def weight_files(folder: Path) -> list[Path]:
    """List the files that the index names, else all; some repositories hold a second copy.

    Raises:
        ModelError: the folder has only pickles or no weights, a shard is missing or outside the
            folder, or several shards have no index.
    """
    index = folder / INDEX
    if index.exists():
        return [folder / name for name in _shards(index)]
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if files:
        _check_unindexed(folder, files)
        return files
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise ModelError(
            f"{folder / pickles[0]}: pickled weights, which run code when they are "
            "loaded, expected safetensors",
            hint="use a copy of the model with *.safetensors files, or convert it once on a "
            "disposable machine: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...)",
        )
    raise ModelError(
        f"{folder}: holds no *.safetensors file", hint="check that the download finished"
    )


def _check_unindexed(folder: Path, files: Sequence[Path]) -> None:
    """Refuse shards without the index, which maps each tensor to its shard."""
    shards = [match for path in files if (match := _SHARD.search(path.name))]
    if not shards:
        return
    present, expected = {int(shard[1]) for shard in shards}, int(shards[0][2])
    missing = sorted(set(range(1, expected + 1)) - present)
    also = f", and {len(missing)} of {expected} shards" if missing else ""
    raise ModelError(
        f"{folder / INDEX}: missing{also} (found: {files[0].name})",
        hint=f"fetch {INDEX} from the model's source, or copy it from where these files came from",
    )


def check_weights(folder: Path) -> None:
    """Read the header of every weight file.

    Raises:
        ModelError: names the first damaged or missing file.
    """
    for path in weight_files(folder):
        read_header(path)


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read (dtype, shape) of each tensor, by name.

    Raises:
        ModelError: the file is truncated or forged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in entries.items()}
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise ModelError(
            f"{path}: not an intact safetensors file: {first_line(error)[:200]}",
            hint="replace the damaged file: fetch it again, or restore it from a copy",
        ) from error


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        odd = [n for n in names if not isinstance(n, str) or Path(n).name != n or n in (".", "..")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index}: not an index of weights: {type(error).__name__}",
            hint="fetch it again from the model's source",
        ) from error
    odd += [n for n in names if n not in odd and not n.endswith(".safetensors")]
    if odd:
        raise ModelError(
            f"{index}: names {odd[0]!r}; a shard is a .safetensors file in the same folder",
            hint="do not use this model: its index names files outside the folder",
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        fault = f"{missing[0]} is missing" if missing else "names no file"
        raise ModelError(
            f"{index}: {fault} ({len(missing)} of {len(names)} files)",
            hint="finish the download: it is not complete",
        )
    return names


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor on the disk: its file, dtype and shape; read on demand."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def floating(self) -> bool:
        return self.dtype in ("F64", "F32", "F16", "BF16")

    def read(self) -> Any:
        """Read this tensor alone.

        The file is opened for each: every page that was read counts as memory of the process while
        the file is mapped (a merge of Llama-2-7B peaked at 10.7 GB with one mapping).
        """
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            return file.get_tensor(self.name)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Tensors in the safetensors files of a folder, by name, in the order of the files."""
    return {
        name: Stored(name, path, *entry)
        for path in weight_files(folder)
        for name, entry in sorted(read_header(path).items())
    }


def write_shards(
    folder: Path, tensors: Sequence[tuple[str, int, Callable[[], Any]]], limit: int = SHARD_BYTES
) -> None:
    """Write tensors in order, one shard in memory at a time.

    Args:
        tensors: (name, bytes, function that makes the tensor).
        limit: bytes of a shard; a larger tensor gets a shard of its own.

    Raises:
        OSError: a file cannot be written.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    split = split_state_dict_into_shards_factory(
        {name: size for name, size, _ in tensors},
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    make = {name: function for name, _, function in tensors}
    for file, names in split.filename_to_tensors.items():
        try:
            save_file({n: make[n]() for n in names}, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        (folder / file).chmod(0o644)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
