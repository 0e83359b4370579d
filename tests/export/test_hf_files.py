"""Exported configs say everything twice where readers disagree, and nothing of this machine."""

import shutil

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorakit.export.hf_files import write_config, write_tokenizer
from lorakit.export.tuned_run import open_source
from lorakit.storage.run_dir import RunDir

from .conftest import LLAMA3_ROPE, make_base, make_run, read_json


@pytest.fixture
def written(variant_run, tmp_path):
    def write(variant):
        source = open_source(variant_run(variant))
        write_config(source, tmp_path, "bfloat16", tied=source.tied)
        write_tokenizer(source, tmp_path)
        return source

    return write


def test_old_and_new_spellings_of_rope_mean_the_same(written, tmp_path):
    written("biases, rope scaling")
    config = read_json(tmp_path / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "llama3"
    read = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {k: v for k, v in read.items() if k != "type"} == LLAMA3_ROPE
    del config["rope_parameters"]
    # What an older reader sees.
    old = AutoConfig.for_model(**{k: v for k, v in config.items() if k != "dtype"})
    assert old.rope_parameters["rope_theta"] == 50000.0
    assert old.rope_parameters["factor"] == 8.0


def test_types_stops_and_template_are_where_anyone_looks(written, tmp_path):
    source = written("several stops")
    config, generation, tokenizer = (
        read_json(tmp_path / f"{n}.json")
        for n in ("config", "generation_config", "tokenizer_config")
    )
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["eos_token_id"] == generation["eos_token_id"] == [2, 0, 7]
    assert tokenizer["eos_token"] == "<|im_end|>"
    assert tokenizer["chat_template"] == source.tokenizer.chat_template
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "x =  12 Hi<|im_end|>"
    assert again(text)["input_ids"] == source.tokenizer(text)["input_ids"]


def test_no_path_of_this_machine_is_written(written, tmp_path):
    source = written("tied")
    for path in tmp_path.glob("*.json"):
        text = path.read_text()
        assert str(source.folder) not in text
        assert str(source.run.path.resolve()) not in text


def test_a_tokenizer_whose_eos_is_no_end_of_turn_gets_the_real_one(tokenizer, tmp_path):
    """Base tokenizers end documents; the template ends turns."""
    base = make_base(tmp_path / "base", tokenizer, "llama", {"stops": [0]})
    values = read_json(base / "tokenizer_config.json")
    text = (base / "tokenizer_config.json").read_text()
    text = text.replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"')
    (base / "tokenizer_config.json").write_text(text)
    assert values["eos_token"] == "<|im_end|>"
    source = open_source(make_run(tmp_path / "run", base))
    assert source.tokenizer.eos_token == "<|endoftext|>"
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tmp_path / "out")
    write_config(source, tmp_path / "out", "float32", tied=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 2
    assert read_json(tmp_path / "out" / "config.json")["eos_token_id"] == [2, 0]


def test_sampling_defaults_do_not_stop_the_writing(variant_run, tmp_path):
    """`temperature` beside `do_sample: false`, as some models ship it, cannot be saved as it is."""
    run = RunDir(tmp_path / "run")
    shutil.copytree(variant_run("tied").path, run.path)
    base = tmp_path / "base"
    shutil.copytree(open_source(run).folder, base)
    (base / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}'
    )
    text = run.recipe.read_text().replace(str(open_source(run).folder), str(base))
    run.recipe.write_text(text)
    source = open_source(run)
    (tmp_path / "out").mkdir()
    write_config(source, tmp_path / "out", "float32", tied=True)
    assert read_json(tmp_path / "out" / "generation_config.json")["do_sample"] is True
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    assert model.config.tie_word_embeddings


@pytest.mark.parametrize(("model_type", "carried"), [("phi3", True), ("llama", False)])
def test_pieces_are_carried_along_where_the_converter_of_gguf_reads_them(
    tokenizer, tmp_path, model_type, carried
):
    base = make_base(tmp_path / "base", tokenizer, model_type, {})
    (base / "tokenizer.model").write_bytes(b"pieces")
    source = open_source(make_run(tmp_path / "run", base))
    (tmp_path / "out").mkdir()
    write_tokenizer(source, tmp_path / "out")
    copy = tmp_path / "out" / "tokenizer.model"
    assert (copy.read_bytes() if copy.exists() else None) == (b"pieces" if carried else None)
    # SmolLM2's tokenizer begins no text with a token of its own, and no reader may assume one.
    written = read_json(tmp_path / "out" / "tokenizer_config.json")
    assert written.get("add_bos_token") == (False if carried else None)
