"""Each written tensor against base and adapter, summed by formulas of its own."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.errors import WorkError
from lorakit.export.merge_weights import STREAMED, write_merged
from lorakit.export.tuned_run import open_source
from lorakit.export.verify_tensors import compare_tensors

from .conftest import VARIANTS, make_run


def written(run, folder, dtype="float32", merge_base="quantized"):
    source = open_source(run)
    folder.mkdir()
    assert write_merged(source, folder, merge_base, dtype) == STREAMED
    return source


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_the_sum(variant_run, tmp_path, variant, dtype):
    source = written(variant_run(variant), tmp_path / "m", dtype)
    found = compare_tensors(source, tmp_path / "m", "quantized")
    assert found["tensors"] == len(load_file(tmp_path / "m" / "model.safetensors"))
    assert found["update_kept"] == pytest.approx(1.0, abs=1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("merge_base", ["quantized", "original"])
def test_the_base_asked_for_is_the_one_compared_with(variant_run, tmp_path, merge_base):
    source = written(variant_run("qlora"), tmp_path / "m", merge_base=merge_base)
    compare_tensors(source, tmp_path / "m", merge_base)
    other = {"quantized": "original", "original": "quantized"}[merge_base]
    with pytest.raises(WorkError, match=r"layers.0.*weight is not in the written files"):
        compare_tensors(source, tmp_path / "m", other)


def without_update(found, base):
    found[NAME] = base[NAME].to(found[NAME].dtype)


def twice(found, base):
    found[NAME] = (2 * found[NAME].float() - base[NAME]).to(found[NAME].dtype)


def next_value(found, base):
    found[NAME].view(torch.int16)[3, 5] += 2


def fewer(found, base):
    del found[NAME]


def other_shape(found, base):
    found[NAME] = found[NAME].T.contiguous()


NAME = "model.layers.1.mlp.down_proj.weight"
HARMS = [without_update, twice, next_value, fewer, other_shape]


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_not_the_sum_is_named(variant_run, tmp_path, harm):
    source = written(variant_run("rslora"), tmp_path / "m", "bfloat16")
    path = tmp_path / "m" / "model.safetensors"
    found, base = load_file(path), load_file(source.folder / "model.safetensors")
    harm(found, base)
    save_file(found, path)
    with pytest.raises(WorkError, match=f"{NAME} is not in the written files"):
        compare_tensors(source, tmp_path / "m", "quantized")


def test_an_update_too_small_for_the_cast_is_told(variant_run, tmp_path):
    """Far below bfloat16's step: the files are right, and hold little of it."""
    base = open_source(variant_run("rslora")).folder
    run = make_run(tmp_path / "run", base, size=1e-5, dtype="bfloat16")
    source = written(run, tmp_path / "m", "bfloat16")
    assert compare_tensors(source, tmp_path / "m", "quantized")["update_kept"] < 0.9
