"""The Go template writes what jinja writes, or is left out; stops and system prompt are there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.made_runs import make_run

from lorakit.errors import ModelError
from lorakit.export.ollama import (
    export_ollama,
    frame_of,
    go_template,
    modelfile,
    modelfile_value,
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
    assert f'SYSTEM "{frame.default_system}"\n' in text
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


def test_base_and_adapter_in_two_files(gguf_run, job):
    order = job(gguf_run("rslora"), adapter=True)
    facts = export_ollama(order)
    text = (order.target / "Modelfile").read_text()
    assert text.startswith("FROM ./base-F16.gguf\nADAPTER ./adapter.gguf\n")
    assert {"base-F16.gguf", "adapter.gguf"} <= {p.name for p in order.target.iterdir()}
    assert facts["kl_per_token"] < 1e-3


def read_value(text):
    """The value that Ollama's parser reads after a command's name (parser/parser.go)."""

    def unquoted(part):
        for quotes in ('"""', '"'):
            if part.startswith(quotes):
                closed = len(part) >= 2 * len(quotes) and part.endswith(quotes)
                return part[len(quotes) : -len(quotes)] if closed else None
        return part

    for end, char in enumerate(text):
        if char in "\r\n" and (value := unquoted(text[:end].strip())) is not None:
            return value
    return None


@pytest.mark.parametrize(
    "text",
    [
        "Be kind.",
        'Say "yes".',
        '"""',
        '"',
        '""',
        'Quote code with """ as Python does.\nThen stop.',
        'A "quoted"\nline',
        "two\r\nlines",
        "  kept spaces  ",
        "\\n is no line break",
    ],
)
def test_a_value_is_read_as_it_was_written(text):
    value = modelfile_value(text)
    assert read_value(f"{value}\nPARAMETER num_ctx 4096\n") == text


@given(st.text(alphabet='ab" \n\r\t', max_size=12))
def test_every_value_is_read_back_or_refused(text):
    value = modelfile_value(text)
    if value is None:
        assert any(line.rstrip().endswith('"""') or '""' in line for line in text.splitlines())
    else:
        assert read_value(f"{value}\n") == text


def learn(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.1)


@pytest.mark.parametrize("adapter", [True, False])
def test_a_system_text_that_would_be_cut_is_refused_before_the_work(
    tiny_model_dir, tmp_path, job, adapter
):
    text = 'Answer in """\nand nothing else.'
    run = make_run(tmp_path / "run", tiny_model_dir, learn, system=text)
    with pytest.raises(ModelError, match="the system text has a line that ends in"):
        export_ollama(job(run, "cut", adapter=adapter))
