"""Which server is started, and by which command."""

import pytest
import torch
from rich.console import Console
from tests.made_runs import TOOL_TEMPLATE

from lorakit.errors import DependencyError, ModelError
from lorakit.export.tuned_run import open_source
from lorakit.serve import engines

QUIET = Console(quiet=True)


def models_of(*runs):
    return {source.name: source for source in map(open_source, runs)}


def installed(monkeypatch, *names, gpu=False):
    """As if only these packages were there."""
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda n: n in names or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)


def vllm(models, monkeypatch):
    """How vLLM would be started, were it there."""
    installed(monkeypatch, "vllm", gpu=True)
    place = engines.Place(port=9, api_key="secret")
    engine, start = engines.choose_engine(models, "auto", place, None, QUIET)
    assert engine == "vllm"
    return start


def test_the_engine_is_the_best_that_is_there(speaker, monkeypatch, tmp_path):
    models = models_of(speaker("fruit", lora_r=5))
    biased = models_of(speaker("fruit", bias="lora_only"))
    with pytest.raises(DependencyError, match="vllm is not installed"):
        engines.choose(models, "vllm", QUIET)
    web = ("starlette", "fastapi", "openai", "uvicorn")
    installed(monkeypatch, "vllm", "xllamacpp", *web, gpu=True)
    assert engines.choose(models, "auto", QUIET) == "vllm"
    assert engines.choose(biased, "auto", QUIET) == "transformers"
    with pytest.raises(DependencyError, match="biases"):
        engines.choose(biased, "vllm", QUIET)
    installed(monkeypatch, "vllm", "xllamacpp", *web)
    assert engines.choose(models, "auto", QUIET) == "llama.cpp"
    installed(monkeypatch, *web)
    assert engines.choose(models, "auto", QUIET) == "transformers"
    installed(monkeypatch)
    with pytest.raises(DependencyError, match="is not installed") as caught:
        engines.choose(models, "auto", QUIET)
    assert "pip install 'lorakit[serve]'" in caught.value.hint


def test_vllms_line_holds_all_adapters_and_no_key(speaker, monkeypatch):
    runs = speaker("fruit"), speaker("animal", lora_r=12)
    first = open_source(runs[0])
    start = vllm(models_of(*runs), monkeypatch)
    line = start.command
    assert line[1:3] == ["serve", first.location]

    def value(flag, count=1):
        at = line.index(flag)
        return line[at + 1] if count == 1 else line[at + 1 : at + 1 + count]

    assert value("--lora-modules", 2) == [f"{r.path.name}={r.adapter}" for r in runs]
    assert value("--max-lora-rank") == "16"
    assert value("--max-loras") == "2"
    assert value("--host", 3) == ["127.0.0.1", "--port", "9"]
    assert value("--middleware") == "lorakit.serve.guard.Guard"
    assert value("--chat-template") == str(runs[0].adapter / "chat_template.jinja")
    assert "secret" not in line
    assert start.defaults["stop_token_ids"] == first.stops()
    # This template has no form for calls: `tools` would be read, and its answer be plain text.
    assert "--tool-call-parser" not in line
    assert all("tools" not in keys for keys in start.keys.values())


def test_tools_are_taken_where_vllm_reads_the_templates_calls(speaker, monkeypatch):
    models = models_of(speaker("fruit"))
    models["fruit"].tokenizer.chat_template = TOOL_TEMPLATE
    start = vllm(models, monkeypatch)
    assert start.command[start.command.index("--tool-call-parser") + 1] == "hermes"
    assert "tools" in start.keys["fruit"]


def test_tools_are_refused_where_the_template_writes_none(speaker, monkeypatch):
    models = models_of(speaker("fruit"), speaker("animal"))
    models["animal"].tokenizer.chat_template = TOOL_TEMPLATE
    monkeypatch.setattr(engines, "export_run", lambda *_: None)
    monkeypatch.setattr(engines, "gguf_file", lambda s: s.run.adapter / "adapter_model.safetensors")
    start = engines._start("llama.cpp", models, engines.Place(port=9), None, QUIET)
    assert ("tools" in start.keys["animal"], "tools" in start.keys["fruit"]) == (True, False)


def test_what_llama_cpp_cannot_convert_goes_to_transformers(speaker, monkeypatch, tmp_path):
    def refuse(*_):
        raise ModelError("llama.cpp does not know this model's tokenizer")

    monkeypatch.setattr(engines, "export_run", refuse)
    models, place = models_of(speaker("fruit", lora_r=6)), engines.Place(port=9)
    engine, start = engines.choose_engine(models, "auto", place, tmp_path, QUIET)
    assert (engine, start.command[-1]) == ("transformers", "fruit")
    names = {path.name for path in (tmp_path / "fruit").iterdir()}
    assert names >= {"model.safetensors", "adapter_model.safetensors", "chat_template.jinja"}
    with pytest.raises(ModelError, match="does not know"):
        engines.choose_engine(models, "llama.cpp", place, tmp_path, QUIET)
