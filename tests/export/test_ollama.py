"""The Go template writes what jinja writes, or is left out; stops and system prompt are there."""

import pytest

from lorakit.export.ollama import (
    export_ollama,
    frame_of,
    go_template,
    modelfile,
    parity,
    render_frame,
)
from lorakit.export.tuned_run import open_source

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + "
    "m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if not loop.last %}old: {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def source(variant_run):
    return open_source(variant_run("rslora"))


def test_smollm2s_template_is_derived_and_its_hidden_system_prompt_found(source):
    frame = frame_of(source)
    assert parity(source, frame)
    assert frame.default_system.startswith("You are a helpful AI assistant named SmolLM")
    text, notes = modelfile(source, ["FROM ./x.gguf"])
    assert notes == []
    assert f'SYSTEM """{frame.default_system}"""' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>" in text
    assert text.count("<|im_start|>assistant") == 2


def test_a_go_engine_renders_it_as_jinja_does(source):
    """Our own reading of the frame must be that of the template language."""
    gotpl = pytest.importorskip("gotpl", reason="checked once, with gotpl 0.1.0")
    frame = frame_of(source)
    turns = [{"Role": "user", "Content": "a"}, {"Role": "assistant", "Content": "b"}]
    turns.append({"Role": "user", "Content": "c"})
    made = gotpl.render(go_template(frame), {"System": frame.default_system, "Messages": turns})
    asked = [{"role": t["Role"], "content": t["Content"]} for t in turns]
    assert made == render_frame(frame, asked)


@pytest.mark.parametrize("template", [LLAMA3, REWRITES])
def test_other_templates_are_proven_or_left_to_jinja(source, template, monkeypatch):
    monkeypatch.setattr(source.tokenizer, "chat_template", template)
    frame = frame_of(source)
    if template is LLAMA3:
        assert parity(source, frame)
        assert frame.user[0].startswith("<|start|>user")
    else:
        assert frame is None or not parity(source, frame)
        text, notes = modelfile(source, ["FROM ./x.gguf"])
        assert "TEMPLATE" not in text
        assert "jinja" in notes[0]


def test_base_and_adapter_in_two_files(variant_run, job):
    order = job(variant_run("rslora"), adapter=True)
    facts = export_ollama(order)
    text = (order.target / "Modelfile").read_text()
    assert text.startswith("FROM ./base-F16.gguf\nADAPTER ./adapter.gguf\n")
    assert {"base-F16.gguf", "adapter.gguf"} <= {p.name for p in order.target.iterdir()}
    assert facts["kl_per_token"] < 1e-3
