"""One table of formats; unknown ones are listed, options that say nothing to one are refused."""

import json
import shutil

import pytest
from rich.console import Console
from tests.made_runs import make_run

from lorakit.errors import DependencyError, ModelError, RecipeError, RunError
from lorakit.export import llama_cpp
from lorakit.export.exporters import EXPORTERS, export_run
from lorakit.hardware import detect_device
from lorakit.model.load import nf4_config


def run_export(run, to, output=None, **options):
    return export_run(run, to, output, Console(quiet=True), **options)


def test_unknown_format_lists_the_known(variant_run):
    with pytest.raises(RecipeError, match="did you mean merged") as caught:
        run_export(variant_run("tied"), "merge")
    assert all(name in caught.value.hint for name in EXPORTERS)


def test_a_format_writes_into_the_run_and_into_verify_json(variant_run):
    run = variant_run("rslora")
    result = run_export(run, "adapter")
    assert result["path"] == str(run.export / "adapter")
    assert (run.export / "adapter" / "adapter_config.json").exists()
    known = json.loads((run.export / "verify.json").read_text())
    assert known["adapter"]["kl_per_token"] == 0.0
    with pytest.raises(RunError, match="exists already"):
        run_export(run, "adapter")


def test_files_elsewhere_do_not_take_the_row_of_another_form(variant_run, tmp_path):
    run = variant_run("patterns")
    run_export(run, "merged")
    before = json.loads((run.export / "verify.json").read_text())["merged"]
    run_export(run, "adapter", tmp_path / "merged")
    known = json.loads((run.export / "verify.json").read_text())
    assert known["merged"] == before
    assert known["adapter, elsewhere: merged"]["format"] == "adapter"


def test_what_to_do_with_the_files_is_said_last_and_in_one_line_each(variant_run, tmp_path):
    console = Console(record=True, width=60)
    export_run(variant_run("rslora"), "vllm", tmp_path / "a-folder", console)
    lines = console.export_text().splitlines()
    wrote = next(i for i, line in enumerate(lines) if line.startswith("wrote "))
    assert any(line.startswith("└") for line in lines[:wrote])  # below the table
    last = [line.split(":")[0] for line in lines if line.startswith(("load it", "vLLM"))]
    assert last == ["load it with", "vLLM"]
    assert lines[-1].startswith("vLLM: vllm serve ")
    assert lines[-1].endswith("--max-model-len 4096") or "--max-model-len" in lines[-1]


WRONG = {
    "--quant does not apply to --to merged": ("merged", {"quant": "Q8_0"}),
    "--adapter does not apply to --to gguf": ("gguf", {"adapter": True}),
    "--repo does not apply to --to vllm": ("vllm", {"repo": "a/b"}),
    "--merge-base half: unknown base": ("merged", {"merge_base": "half"}),
    "--dtype int8: unknown": ("merged", {"dtype": "int8"}),
    "--quant Q9: unknown quantization": ("gguf", {"quant": "Q9"}),
    "--to hub needs the repository": ("hub", {}),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options_are_said_before_anything_is_written(variant_run, tmp_path, message):
    to, options = WRONG[message]
    with pytest.raises(RecipeError, match=message) as caught:
        run_export(variant_run("tied"), to, tmp_path / "out", **options)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_missing_engine_is_said_before_anything_is_written(variant_run, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    with pytest.raises(DependencyError, match="xllamacpp") as caught:
        run_export(variant_run("tied"), "gguf", tmp_path / "out", quant="Q4_K_M")
    assert "lorakit[gguf]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_base_stored_in_four_bits_has_no_original(tiny_model_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(tiny_model_dir, tmp_path / "base")
    config = nf4_config(detect_device("float32", prefer="cpu"), set())
    AutoModelForCausalLM.from_pretrained(base, quantization_config=config).save_pretrained(base)

    def learn(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)

    run = make_run(tmp_path / "run", base, learn, method="qlora")
    for to in ("merged", "gguf", "vllm"):
        with pytest.raises(ModelError, match="this base has no 16-bit original") as caught:
            run_export(run, to, merge_base="original")
        assert "--merge-base" in caught.value.hint
