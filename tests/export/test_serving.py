"""The printed lines name what the engine needs, and what it cannot take is merged with a reason."""

from pathlib import Path

import pytest

from lorakit.export.serving import export_vllm, vllm_command, why_vllm_cannot
from lorakit.export.tuned_run import open_source

WHY = {
    "rslora": None,
    "patterns": None,
    "dora": "DoRA",
    "biases, rope scaling": "biases",
    "modules_to_save": "modules_to_save",
    "qlora": "QLoRA",
}


@pytest.mark.parametrize("variant", WHY)
def test_what_vllm_takes(variant_run, variant):
    reason = why_vllm_cannot(open_source(variant_run(variant)))
    assert reason is None if WHY[variant] is None else WHY[variant] in reason


def test_an_adapter_line_makes_room_for_its_rank_and_names_the_template(variant_run, job):
    order = job(variant_run("patterns"))
    facts = export_vllm(order)
    assert not facts["merged"]
    line = facts["command"].split()
    assert line[line.index("--max-lora-rank") + 1] == "8"
    assert line[line.index("--lora-modules") + 1].endswith(f"={order.target}")
    assert line[line.index("--chat-template") + 1] == str(order.target / "chat_template.jinja")
    assert (order.target / "chat_template.jinja").exists()
    text = (order.target / "COMMANDS.md").read_text()
    assert str(order.target) not in text
    assert str(order.source.folder) not in text


def test_what_vllm_refuses_is_merged(variant_run, job):
    order = job(variant_run("dora"))
    facts = export_vllm(order)
    assert facts["merged"]
    assert "DoRA" in facts["reason"]
    assert (order.target / "model.safetensors").exists()
    assert "--enable-lora" not in facts["command"]


@pytest.mark.parametrize(
    ("text", "parser"),
    [("<tool_call>\n{}", "hermes"), ("<tool_call>\n<function=a>", "qwen3_coder"),
     ("[TOOL_CALLS]", "mistral"), ("<|python_tag|>", "llama3_json"), ("", None)],
)  # fmt: skip
def test_vllm_reads_calls_in_the_form_of_the_template(variant_run, text, parser):
    source = open_source(variant_run("rslora"))
    source.tokenizer.chat_template += "{# " + text + " #}"
    line = vllm_command({"one": Path("a"), "two": Path("b=c")}, source, source)
    at = line.index("--lora-modules")
    assert line[at + 1 : at + 3] == ["one=a", '{"name": "two", "path": "b=c"}']
    if parser is None:
        assert "--tool-call-parser" not in line
    else:
        assert line[-3:] == ["--enable-auto-tool-choice", "--tool-call-parser", parser]
