"""Torn and forged safetensors files, pickles and indexes that reach out are named in one line."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from lorakit.errors import ModelError
from lorakit.model.safetensors_io import INDEX, check_weights, read_header, weight_files

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
NEXT = {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]}


def forged(header, data=24):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * data


FORGED = {
    "empty": (b"", "header too small"),
    "three bytes": (b"abc", "header too small"),
    "a huge header": (struct.pack("<Q", 2**62) + b"{}", "header too large"),
    "a header longer than the file": (struct.pack("<Q", 100) + b"{}", "invalid header length"),
    "no JSON": (forged(b"{nothing", 0), "invalid JSON"),
    "no UTF-8": (forged(b'{"\xff": 1}', 0), "invalid UTF-8"),
    "a list": (forged([], 0), "invalid type: sequence"),
    "nested deeply": (forged(b"[" * 5000 + b"]" * 5000, 0), "invalid type: sequence"),
    "an overlap": (
        forged({"a": GOOD, "b": {**NEXT, "data_offsets": [16, 24]}}, 24), "offset .*`b`"),
    "a gap": (forged({"a": GOOD, "b": {**NEXT, "data_offsets": [28, 36]}}, 36), "offset .*`b`"),
    "not from the start": (forged({"a": {**GOOD, "data_offsets": [8, 32]}}, 32), "offset .*`a`"),
    "too little data": (forged({"a": GOOD}, 20), "file not fully covered"),
    "too much data": (forged({"a": GOOD}, 30), "file not fully covered"),
    "offsets the wrong way": (forged({"a": {**GOOD, "data_offsets": [24, 0]}}), "offset .*`a`"),
    "negative offsets": (forged({"a": {**GOOD, "data_offsets": [-24, 0]}}), "integer `-24`"),
    "offsets as text": (forged({"a": {**GOOD, "data_offsets": ["0", "24"]}}), "type: string"),
    "three offsets": (forged({"a": {**GOOD, "data_offsets": [0, 8, 24]}}), "invalid length 3"),
    "no offsets": (forged({"a": {"dtype": "F32", "shape": [6]}}), "missing field `data_offsets`"),
    "an unknown type": (forged({"a": {**GOOD, "dtype": "F3"}}), "unknown variant `F3`"),
    "a type that is a list": (forged({"a": {**GOOD, "dtype": ["F32"]}}), "invalid type: sequence"),
    "another shape": (forged({"a": {**GOOD, "shape": [2, 4]}}), "invalid shape"),
    "a negative shape": (forged({"a": {**GOOD, "shape": [-2, -3]}}), "integer `-2`"),
    "a shape beyond 64 bits": (forged({"a": {**GOOD, "shape": [2**62, 2**62]}}), "overflow"),
    "a shape of fractions": (forged({"a": {**GOOD, "shape": [1.5, 4]}}), "floating point"),
    "a number": (forged({"a": 3}), "invalid type: integer"),
    "null": (forged({"a": None}), "invalid type: null"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_a_forged_file_is_named_in_one_line(tmp_path, kind):
    content, reason = FORGED[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=reason) as caught:
        check_weights(tmp_path)
    assert caught.value.message.startswith(f"{path}: not an intact safetensors file: ")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < len(str(path)) + 250


def test_every_truncation_of_a_real_file_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.ones(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header == {
        "a": ("F32", (3, 4)), "b": ("BF16", (5,))
    }  # fmt: skip
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_header(path)


@pytest.mark.parametrize("name", ["a.bin", "a.pt", "a.pth", "a.ckpt", "a.h5"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="which run code when they are loaded") as caught:
        weight_files(tmp_path)
    assert name in caught.value.message
    assert "safetensors" in caught.value.hint
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors file"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"a": "../x.safetensors"}}, "names '../x.safetensors'"),
        ({"weight_map": {"a": "/etc/x.safetensors"}}, "names '/etc"),
        ({"weight_map": {"a": ".."}}, "names '..'"),
        ({"weight_map": {"a": "x.bin"}}, "names 'x.bin'"),
        ({"weight_map": {"a": 3}}, "names 3"),
        ({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}, r"is missing \(1 of 2"),
        ({"weight_map": {}}, "names no file"),
        ({"weight_map": [1]}, "not an index of weights"),
        ([], "not an index of weights"),
    ],
)
def test_an_index_that_is_wrong_or_reaches_out(tmp_path, index, reason):
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=reason) as caught:
        check_weights(tmp_path)
    assert INDEX in caught.value.message
    assert caught.value.hint


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        read_header(tmp_path / "gone.safetensors")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-00001-of-00002", "model-00002-of-00002"], "index.json: missing .found"),
        (["model-00002-of-00003"], "index.json: missing, and 2 of 3 shards"),
        (["model-00001-of-00001"], "index.json: missing .found"),
        (["pytorch_model-00001-of-00002"], "index.json: missing, and 1 of 2 shards"),
    ],
)
def test_shards_without_their_index_are_named(tmp_path, names, message):
    for name in names:
        save_file({"w": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=message):
        check_weights(tmp_path)
