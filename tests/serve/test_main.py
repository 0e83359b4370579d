"""Which engine serves, and what is refused before a model is loaded."""

import socket

import pytest
import torch
from rich.console import Console

from lorakit.errors import DependencyError, RecipeError, RunError
from lorakit.export.tuned_run import open_source
from lorakit.serve import main
from lorakit.serve.main import Place, check_port, read_key, serve, vllm_line, why_not_vllm

QUIET = Console(quiet=True)


def test_the_network_is_let_in_with_a_key_only(speaker):
    with pytest.raises(RecipeError, match="lets other machines in"):
        serve([speaker("fruit")], Place("0.0.0.0"), "embedded", QUIET)
    with pytest.raises(RecipeError, match="--engine tgi: unknown"):
        serve([speaker("fruit")], Place(), "tgi", QUIET)


def test_a_port_that_is_taken_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"cannot listen on 127.0.0.1:{port}"):
            check_port(Place(port=port))
    check_port(Place(port=0))
    with pytest.raises(RunError, match="cannot listen on"):
        check_port(Place(host="192.0.2.1"))


def test_vllm_serves_where_it_is_and_can(speaker, monkeypatch):
    sources = [open_source(speaker("fruit"))]
    biased = open_source(speaker("fruit", bias="lora_only"))
    assert why_not_vllm(sources) == "vLLM is not installed"
    with pytest.raises(DependencyError, match="vLLM is not installed"):
        serve([speaker("fruit")], Place(port=0), "vllm", QUIET)
    monkeypatch.setattr(main.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert why_not_vllm(sources) is None
    assert "biases" in why_not_vllm([*sources, biased])


def test_vllms_line_holds_all_adapters_and_no_key(speaker):
    runs = speaker("fruit"), speaker("animal", lora_r=12)
    line = vllm_line([open_source(r) for r in runs], Place(port=9, api_key="secret"))
    first = line.index("--lora-modules")
    assert line[first + 1 : first + 3] == [f"{r.path.name}={r.adapter}" for r in runs]
    assert line[line.index("--max-lora-rank") + 1] == "16"
    assert line[-4:] == ["--host", "127.0.0.1", "--port", "9"]
    assert "secret" not in line


def test_a_key_comes_from_the_option_or_a_file(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    assert read_key(None, tmp_path / "key") == "secret"
    assert read_key("k", None) == "k"
    assert read_key(None, None) is None
    with pytest.raises(RecipeError, match="both give a key"):
        read_key("k", tmp_path / "key")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_key(None, tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(RecipeError, match="is empty"):
        read_key(None, tmp_path / "empty")
