"""A folder of weights enters; the tensors its safetensors files hold leave, or the damaged file.

Only safetensors are read: a pickle (.bin, .pt, .pth, .ckpt) is a program that runs when it is
loaded. The header of each file is checked before a library maps it, so that a torn or forged file
is named, in one line.

Named tensors enter one by one; safetensors files and their index leave, one shard in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from lorakit.errors import ModelError

INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")
# safetensors' own limit of a header; that of a model of 1,000 experts takes 30 MB.
LARGEST_HEADER = 100 * 10**6
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8}
BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F4": 4, "F6_E2M3": 6}
BITS |= {"F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}


def weight_files(folder: Path) -> list[Path]:
    """The files that the index names, else all: some repositories hold a second copy.

    Raises:
        ModelError: pickles only, nothing at all, a shard that is missing or outside the folder.
    """
    index = folder / INDEX
    if index.exists():
        return [folder / name for name in _shards(index)]
    single = folder / "model.safetensors"
    found = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if found:
        return found
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise ModelError(
            f"{folder / pickles[0]}: these weights are a pickle, a program that runs when it is "
            "loaded; only safetensors are read",
            hint="take a copy of the model with *.safetensors files, or convert it once on a "
            "machine that may be lost: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(...)",
        )
    raise ModelError(f"{folder}: holds no *.safetensors file", hint="was the download cut off?")


def check_weights(folder: Path) -> None:
    """Read every header.

    Raises:
        ModelError: names the first file that is damaged or missing.
    """
    for path in weight_files(folder):
        read_header(path)


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """(type, shape, place in the file, bytes) of each tensor, by name.

    Raises:
        ModelError: the file is torn or forged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"its header would take {length:,} bytes, it has {size:,} in all")
            header = json.loads(handle.read(length), object_pairs_hook=_no_twins)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        return dict(_places(header, 8 + length, size))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(
            f"{path}: is no whole safetensors file: {first}",
            hint="it is damaged: fetch it again, or bring it back from a copy",
        ) from error


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header names {twin[:80]!r} twice")
    return found


def _places(
    header: dict[str, Any], begin: int, size: int
) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int, int]]]:
    """Tensors lie one behind the other and fill the file, as the format demands."""
    at, found = 0, []
    for name, about in header.items():
        if name == "__metadata__":
            continue
        kind, shape, (first, last) = about["dtype"], tuple(about["shape"]), about["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        if kind not in BITS or not whole or (last - first) * 8 != prod(shape) * BITS[kind]:
            raise ValueError(f"{name[:80]!r} has a type, shape and place that do not agree")
        found.append((first, last, name, kind, shape))
    for first, last, name, kind, shape in sorted(found):
        if first != at:
            how = "overlaps another" if first < at else "leaves a gap before it"
            raise ValueError(f"{name[:80]!r} {how}")
        at = last
        yield name, (kind, shape, begin + first, last - first)
    if begin + at != size:
        raise ValueError(f"it has {size:,} bytes, its header says {begin + at:,}")


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        odd = [n for n in names if not isinstance(n, str) or Path(n).name != n or n in (".", "..")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(
            f"{index}: is no index of weights: {type(error).__name__}",
            hint="fetch it again from where the model came from",
        ) from error
    odd += [n for n in names if n not in odd and not n.endswith(".safetensors")]
    if odd:
        raise ModelError(
            f"{index}: names {odd[0]!r}; a shard is a .safetensors file in the same folder",
            hint="do not use this model: its index reaches for other files",
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing or not names:
        what = f"{missing[0]} is missing" if missing else "names no file"
        raise ModelError(
            f"{index}: {what} ({len(missing)} of {len(names)} files)",
            hint="the download is not complete: fetch the rest",
        )
    return names


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
