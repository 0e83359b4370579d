"""K-quants: llama.cpp's types tensor by tensor, and blocks that dequantize to what went in."""

import gguf
import numpy as np
import pytest

from lorakit.errors import DependencyError
from lorakit.export import gguf_quantize
from lorakit.export.gguf_quantize import FILE_TYPES, quantize_gguf, tensor_type

LAYERS = 8


def types(kind, part, width=512):
    return [
        tensor_type(f"blk.{i}.{part}.weight", width, kind, LAYERS, False) for i in range(LAYERS)
    ]


def test_the_sensitive_layers_get_more_bits():
    # First and last eighth, and every third of the rest, counted from the first eighth.
    more, few = "Q6_K", "Q4_K"
    assert types("Q4_K_M", "attn_v") == [more, few, few, more, few, few, more, more]
    assert types("Q4_K_M", "ffn_down") == types("Q4_K_M", "attn_v")
    assert types("Q4_K_S", "attn_v") == ["Q5_K"] * 4 + [few] * 4
    assert set(types("Q4_K_M", "attn_q") + types("Q4_K_M", "ffn_up")) == {few}


def test_head_vectors_and_odd_rows():
    assert tensor_type("output.weight", 512, "Q4_K_M", LAYERS, False) == "Q6_K"
    assert tensor_type("token_embd.weight", 512, "Q4_K_M", LAYERS, True) == "Q6_K"
    assert tensor_type("token_embd.weight", 512, "Q4_K_M", LAYERS, False) == "Q4_K"
    assert tensor_type("blk.0.attn_norm.weight", 512, "Q4_K_M", LAYERS, False) is None
    assert tensor_type("blk.0.attn_q.bias", 512, "Q4_K_M", LAYERS, False) is None
    assert tensor_type("output.weight", 576, "Q4_K_M", LAYERS, False) == "Q8_0"
    assert types("Q4_K_M", "attn_q", 576) == ["Q5_0"] * LAYERS


def write_file(path, weight):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_file_type(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("blk.0.attn_q.weight", weight.astype(np.float16))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(512, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Relative error of normal numbers: what the bits allow.
ERRORS = {"Q4_K_M": 0.09, "Q5_K_M": 0.05, "Q6_K": 0.025}


@pytest.mark.parametrize("kind", ERRORS)
def test_blocks_hold_what_went_in(tmp_path, kind, monkeypatch):
    weight = np.random.default_rng(0).normal(size=(300, 512)).astype(np.float32)
    write_file(tmp_path / "a.gguf", weight)
    monkeypatch.setattr(gguf_quantize, "CHUNK_BYTES", 2**16)
    assert quantize_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", kind) == 0
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    found = {t.name: t for t in reader.tensors}
    tensor = found["blk.0.attn_q.weight"]
    back = gguf.dequantize(tensor.data, tensor.tensor_type)
    error = np.linalg.norm(back - weight) / np.linalg.norm(weight)
    assert 1e-4 < error < ERRORS[kind]
    assert (found["blk.0.attn_norm.weight"].data == 1).all()
    assert reader.get_field("general.file_type").contents() == FILE_TYPES[kind].number
    assert reader.get_field("tokenizer.ggml.tokens").contents() == ["a", "b"]


def test_a_package_without_the_kernels_is_explained(monkeypatch):
    monkeypatch.setattr(gguf_quantize.ctypes, "CDLL", lambda _: object())
    with pytest.raises(DependencyError, match="K-quants need") as caught:
        gguf_quantize._kernel()
    assert "Q8_0" in caught.value.hint
