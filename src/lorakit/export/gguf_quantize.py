"""Quantize a 16- or 32-bit GGUF file to one of llama.cpp's K-quants.

The kernel is `ggml_quantize_chunk` of the ggml library in the `xllamacpp` package, whose Python API
cannot quantize. The type of each tensor follows llama.cpp's rule for its file types: the output
matrix, and in the M types value and down projections of the first, last and every third layer
between, get more bits; vectors keep their type.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.errors import DependencyError

INSTALL = "pip install 'lorakit[gguf]'"


@dataclass(frozen=True, slots=True)
class FileType:
    """Types of one file type: of most matrices, of sensitive ones, and llama.cpp's number."""

    plain: str
    more: str
    number: int


# Numbers of `llama_ftype` in llama.h.
FILE_TYPES = {
    "Q4_K_S": FileType("Q4_K", "Q5_K", 14),
    "Q4_K_M": FileType("Q4_K", "Q6_K", 15),
    "Q5_K_S": FileType("Q5_K", "Q5_K", 16),
    "Q5_K_M": FileType("Q5_K", "Q6_K", 17),
    "Q6_K": FileType("Q6_K", "Q6_K", 18),
}
# Blocks of 256 need row lengths that are multiples of 256; otherwise llama.cpp uses types with
# blocks of 32.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
MATRICES = (
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    *("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
)
CHUNK_BYTES = 2**25


def tensor_type(name: str, width: int, kind: str, layers: int, tied: bool) -> str | None:
    """Choose the quantization of a tensor with rows of `width`; None to keep its type."""
    *prefix, module, leaf = name.split(".")
    if leaf != "weight" or module not in (*MATRICES, "output", "token_embd"):
        return None
    file = FILE_TYPES[kind]
    chosen = file.plain
    if module == "output" or (module == "token_embd" and tied):
        chosen = "Q6_K"
    elif prefix:
        layer = int(prefix[1])
        if kind in ("Q4_K_M", "Q5_K_M"):
            sensitive = module.startswith(("attn_v", "ffn_down")) and _more_bits(layer, layers)
            chosen = file.more if sensitive else file.plain
            if module == "attn_qkv":
                chosen = "Q5_K" if kind == "Q4_K_M" else "Q6_K"
        elif kind == "Q4_K_S" and (
            (module == "attn_v" and layer < 4) or (module == "ffn_down" and layer < layers // 8)
        ):
            chosen = file.more
    return FALLBACK[chosen] if width % 256 else chosen


def _more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def quantize_gguf(source: Path, target: Path, kind: str, threads: int | None = None) -> int:
    """Write `target` as `kind`; return the number of matrices with a fallback type (odd rows).

    Raises:
        DependencyError: xllamacpp is missing, or lacks ggml's kernels.
    """
    import gguf

    kernel = _kernel()
    reader = gguf.GGUFReader(source)
    architecture = _value(reader, "general.architecture")
    layers = int(_value(reader, f"{architecture}.block_count"))
    tied = all(t.name != "output.weight" for t in reader.tensors)
    writer = gguf.GGUFWriter(target, architecture)
    _copy_values(reader, writer, FILE_TYPES[kind].number)
    plan = []
    fallbacks = 0
    for tensor in reader.tensors:
        width = int(tensor.shape[0])
        name = tensor_type(tensor.name, width, kind, layers, tied)
        fallbacks += bool(name and width % 256)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if name is None:
            writer.add_tensor_info(
                tensor.name,
                tensor.data.shape,
                tensor.data.dtype,
                tensor.n_bytes,
                tensor.tensor_type,
            )
        else:
            dtype = gguf.GGMLQuantizationType[name]
            stored = gguf.quant_shape_to_byte_shape(shape, dtype)
            size = int(np.prod(stored))
            writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), size, dtype)
        plan.append((tensor, name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for tensor, name in plan:
            data = tensor.data if name is None else _quantize(kernel, pool, tensor, name)
            writer.write_tensor_data(data)
    writer.close()
    return fallbacks


def _quantize(kernel: Any, pool: ThreadPoolExecutor, tensor: Any, name: str) -> np.ndarray:
    """Quantize a tensor in chunks of rows; return its blocks as bytes [rows, row bytes]."""
    import gguf

    dtype = gguf.GGMLQuantizationType[name]
    width = int(tensor.shape[0])
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    block, size = gguf.GGML_QUANT_SIZES[dtype]
    out = np.empty((len(rows), width // block * size), np.uint8)
    chunk_rows = max(1, CHUNK_BYTES // (4 * width))

    def quantize_chunk(start: int) -> None:
        chunk = gguf.dequantize(rows[start : start + chunk_rows], tensor.tensor_type)
        chunk = np.ascontiguousarray(chunk, np.float32)
        kernel(
            int(dtype),
            chunk.ctypes.data,
            out[start:].ctypes.data,
            0,
            len(chunk),
            width,
            None,
        )

    list(pool.map(quantize_chunk, range(0, len(rows), chunk_rows)))
    return out


def _kernel() -> Callable[..., int]:
    """Load ggml_quantize_chunk(type, float* src, void* dst, start, rows, row length, imatrix)."""
    try:
        import xllamacpp.xllamacpp as library

        function = ctypes.CDLL(library.__file__).ggml_quantize_chunk
    except (ImportError, AttributeError, OSError) as error:
        raise DependencyError(
            f"K-quants need llama.cpp as packaged in xllamacpp: {error}",
            hint=f"{INSTALL}, or take --quant F16, BF16 or Q8_0",
        ) from error
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    function.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    function.restype = ctypes.c_size_t
    kernel: Callable[..., int] = function
    return kernel


def _value(reader: Any, key: str) -> Any:
    return reader.get_field(key).contents()


def _copy_values(reader: Any, writer: Any, file_type: int) -> None:
    from gguf import GGUFValueType

    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        value_type = field.types[0]
        element_type = field.types[-1] if value_type == GGUFValueType.ARRAY else None
        value = file_type if field.name == "general.file_type" else field.contents()
        writer.add_key_value(field.name, value, value_type, sub_type=element_type)
