"""Read and write safetensors files, one tensor or shard in memory at a time.

Only safetensors are read: a pickle (.bin, .pt, .pth, .ckpt) is a program that runs when it is
loaded. The header of each file is checked before a library maps it, so that the error for a
truncated or forged file names the file, in one line.
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
# safetensors' limit of a header; the header of a model with 1,000 experts takes 30 MB.
LARGEST_HEADER = 100 * 10**6
BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8}
BITS |= {"U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F4": 4, "F6_E2M3": 6}
BITS |= {"F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8}
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}


def weight_files(folder: Path) -> list[Path]:
    """List the files that the index names, else all; some repositories hold a second copy.

    Raises:
        ModelError: the folder has only pickles or no weights, or a shard is missing or outside
            the folder.
    """
    index = folder / INDEX
    if index.exists():
        return [folder / name for name in _shards(index)]
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if files:
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


def check_weights(folder: Path) -> None:
    """Read the header of every weight file.

    Raises:
        ModelError: names the first damaged or missing file.
    """
    for path in weight_files(folder):
        read_header(path)


def read_header(path: Path) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """Read (dtype, shape, offset in the file, bytes) of each tensor, by name.

    Raises:
        ModelError: the file is truncated or forged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise ValueError(f"header of {length:,} bytes in a file of {size:,}")
            header = json.loads(handle.read(length), object_pairs_hook=_reject_duplicates)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        return dict(_spans(header, 8 + length, size))
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        first = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(
            f"{path}: not an intact safetensors file: {first}",
            hint="replace the damaged file: fetch it again, or restore it from a copy",
        ) from error


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    header = dict(pairs)
    if len(header) != len(pairs):
        names = [name for name, _ in pairs]
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header names {twin[:80]!r} twice")
    return header


def _spans(
    header: dict[str, Any], begin: int, size: int
) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int, int]]]:
    """Yield each tensor, checking that tensors are contiguous and fill the file, as specified."""
    end, spans = 0, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        valid = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        if dtype not in BITS or not valid or (last - first) * 8 != prod(shape) * BITS[dtype]:
            raise ValueError(f"{name[:80]!r} has a dtype, shape and offsets that do not agree")
        spans.append((first, last, name, dtype, shape))
    for first, last, name, dtype, shape in sorted(spans):
        if first != end:
            fault = "overlaps another" if first < end else "follows a gap"
            raise ValueError(f"{name[:80]!r} {fault}")
        end = last
        yield name, (dtype, shape, begin + first, last - first)
    if begin + end != size:
        raise ValueError(f"it has {size:,} bytes, expected {begin + end:,} from its header")


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


# Peak memory is about one shard and one tensor in float32.
SHARD_BYTES = 2 * 10**9

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
TYPES |= {"BOOL": "bool"}


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor on the disk: its file, dtype, shape and offset; read on demand."""

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
        """Read only this tensor's bytes of the file.

        `safe_open` maps the complete file, and every page read counts as memory of the process: a
        merge of Llama-2-7B peaked at 10.7 GB that way.
        """
        import torch

        buffer = bytearray(self.length)
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            handle.readinto(buffer)
        return torch.frombuffer(buffer, dtype=getattr(torch, TYPES[self.dtype])).view(self.shape)


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
    shards: list[list[tuple[str, int, Callable[[], Any]]]] = [[]]
    for entry in tensors:
        if shards[-1] and sum(size for _, size, _ in shards[-1]) + entry[1] > limit:
            shards.append([])
        shards[-1].append(entry)
    shard_of: dict[str, str] = {}
    for position, shard in enumerate(shards, 1):
        name = f"model-{position:05d}-of-{len(shards):05d}.safetensors"
        path = folder / (name if len(shards) > 1 else "model.safetensors")
        _write_one(path, shard)
        shard_of |= dict.fromkeys((n for n, _, _ in shard), path.name)
    if len(shards) > 1:
        total = sum(size for _, size, _ in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_one(path: Path, shard: Sequence[tuple[str, int, Callable[[], Any]]]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: make() for name, _, make in shard}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(0o644)
