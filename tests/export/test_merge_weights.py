"""Which bases are merged tensor by tensor, what a model weighs, what a damaged adapter gives."""

import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from lorakit.errors import ModelError, WorkError
from lorakit.export import merge_weights
from lorakit.export.merge_weights import _reason_against_streaming, parameters, write_merged
from lorakit.export.tuned_run import open_source
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir

from .conftest import make_run, poisoned


def test_an_untied_head_counts_once_more(variant_run):
    tied = parameters(open_source(variant_run("tied")))
    untied = parameters(open_source(variant_run("tied, head adapted")))
    assert untied - tied == 2048 * 64  # words times width


def test_an_adapter_that_lacks_a_module_is_refused(variant_run, tmp_path):
    run = RunDir(tmp_path / "run")
    shutil.copytree(variant_run("rslora").path, run.path)
    tensors = load_file(run.adapter / ADAPTER_WEIGHTS)
    lost = next(n for n in tensors if "lora_B" in n)
    save_file({n: t for n, t in tensors.items() if n != lost}, run.adapter / ADAPTER_WEIGHTS)
    (run.adapter / "MANIFEST.json").unlink()
    (tmp_path / "m").mkdir()
    with pytest.raises(ModelError, match="has no tensor for"):
        write_merged(open_source(run), tmp_path / "m", "quantized", "float32")


def test_schemes_that_change_the_base_go_through_memory(variant_run, tmp_path):
    base = open_source(variant_run("rslora")).folder
    run = make_run(tmp_path / "run", base, init_lora_weights="pissa_niter_4")
    (tmp_path / "m").mkdir()
    way = write_merged(open_source(run), tmp_path / "m", "quantized", "float32")
    assert way == "in memory (pissa_niter_4 changes the base as it loads)"


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("streamed", [True, False])
def test_one_number_of_the_adapter_that_is_none_is_not_merged(
    variant_run, tmp_path, monkeypatch, value, streamed
):
    run = poisoned(variant_run("rslora"), tmp_path / "run", value)
    if not streamed:
        monkeypatch.setattr(merge_weights, "_reason_against_streaming", lambda _: "a test")
    (tmp_path / "m").mkdir()
    with pytest.raises(WorkError, match=r"layers.0.mlp.down_proj.weight: -?(nan|inf) at element"):
        write_merged(open_source(run), tmp_path / "m", "quantized", "float32")


def test_a_quantized_base_is_not_streamed(variant_run):
    """Its packed integers and their scales are no weights."""
    source = open_source(variant_run("rslora"))
    source.config.quantization_config = {"quant_method": "gptq"}
    assert _reason_against_streaming(source) == "the base is quantized on the disk"


def test_single_trained_tokens_are_not_streamed(variant_run):
    source = open_source(variant_run("rslora"))
    source.adapter["trainable_token_indices"] = {"embed_tokens": [5]}
    assert _reason_against_streaming(source) == "single tokens were trained"
