"""Named tensors enter one by one; safetensors files and their index leave, one shard in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lorakit.model.weight_files import INDEX, read_header, weight_files

# Peak memory is about one shard and one tensor in float32.
SHARD_BYTES = 2 * 10**9


TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
TYPES |= {"BOOL": "bool"}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor on the disk: its file, type, shape and place; read on demand."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def floating(self) -> bool:
        return self.dtype in ("F64", "F32", "F16", "BF16")

    def read(self) -> Any:
        """The tensor, and no more of the file.

        `safe_open` maps the whole file, and all of it counts as memory of the process once read: a
        merge of Llama-2-7B peaked at 10.7 GB that way.
        """
        import torch

        buffer = bytearray(self.length)
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            handle.readinto(buffer)
        return torch.frombuffer(buffer, dtype=getattr(torch, TYPES[self.dtype])).view(self.shape)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """What the safetensors files of a folder hold, by name, in the files' order."""
    return {
        name: Stored(name, path, *about)
        for path in weight_files(folder)
        for name, about in sorted(read_header(path).items())
    }


def write_shards(
    folder: Path, tensors: Sequence[tuple[str, int, Callable[[], Any]]], limit: int = SHARD_BYTES
) -> None:
    """Write (name, bytes, maker) in order, each made when its turn comes.

    Raises:
        OSError: the disk refused.
    """
    shards: list[list[tuple[str, int, Callable[[], Any]]]] = [[]]
    for entry in tensors:
        if shards[-1] and sum(size for _, size, _ in shards[-1]) + entry[1] > limit:
            shards.append([])
        shards[-1].append(entry)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path = folder / (name if len(shards) > 1 else "model.safetensors")
        _write_one(path, shard)
        where |= dict.fromkeys((n for n, _, _ in shard), path.name)
    if len(shards) > 1:
        total = sum(size for _, size, _ in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_one(path: Path, shard: Sequence[tuple[str, int, Callable[[], Any]]]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: make() for name, _, make in shard}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(0o644)
