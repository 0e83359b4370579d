"""What is trained is visible without color."""

import io
import json
import re

import pytest
from rich.console import Console

from lorakit.data.inspection import inspect_prepared, measure, token_texts
from lorakit.data.prepare import prepare_data
from lorakit.data.tokenize.encode import encode
from lorakit.display.inspection_view import (
    MASKED,
    inspection_view,
    length_lines,
    render_example,
    report_view,
    token_text,
)
from lorakit.recipe.schema import Recipe


def test_trained_tokens_stand_between_brackets(smollm, chat):
    (example,) = encode(smollm, chat("Hi [there]?", "One two.", "And?", "Three.", system="Brief."))
    assert render_example(smollm, example).plain == (
        "<|im_start|>system\nBrief.<|im_end|>\n<|im_start|>user\nHi [there]?<|im_end|>\n"
        "<|im_start|>assistant\n⟦One two.<|im_end|>⟧\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n⟦Three.<|im_end|>⟧"
    )


def test_masked_text_is_dim_and_trained_text_is_not(smollm, chat):
    (example,) = encode(smollm, chat("question", "answer"))
    text = render_example(smollm, example)
    styles = {text.plain[s.start : s.end]: str(s.style) for s in text.spans}
    assert styles["answer"] != MASKED
    assert any("question" in part and style == MASKED for part, style in styles.items())


def test_llama2_pieces_keep_their_spaces(family, chat):
    tokenizer = family("llama2")
    (example,) = encode(tokenizer, chat("Hi", "One two."))
    assert render_example(tokenizer, example).plain == "<s> [INST] Hi [/INST]⟦ One two. </s>⟧"


def test_a_report_counts_rows_tokens_and_faults():
    from lorakit.types import DataReport, Fault

    report = DataReport(
        sources=({"source": "a.jsonl", "format": "text", "rows": 9},),
        rows_read=9,
        examples_train=6,
        examples_val=2,
        tokens_train=100,
        trained_tokens_train=40,
        tokens_val=30,
        trained_tokens_val=10,
        longest_example=31,
        cutoff_len=64,
        template="the model's own",
        faults=(Fault("empty [answer]", 1, ("a.jsonl:4",), "left out"),),
    )
    text = report_view(report).plain
    assert "a.jsonl: 9 rows, format text" in text
    assert "6 to train on, 2 held out; 40 of 100 tokens trained (40%); longest 31 of 64" in text
    assert "1 x empty [answer]: left out (a.jsonl:4)" in text


def shown_on(width, inspection, **options):
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(inspection_view(inspection))
    return stream.getvalue()


@pytest.fixture
def inspected(smollm, tmp_path):
    rows = [
        {"question": f"What is {i}?\x1b[2J", "answer": "[b]word[/b] " * (i + 1)} for i in range(20)
    ]
    rows += [{"question": "no answer", "answer": None}, {"question": "y " * 300, "answer": "x"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {"model": "demo", "data": str(path), "cutoff_len": 200, "on_overlength": "error"}
    )
    prepared = prepare_data(recipe, smollm, inspecting=True)
    return inspect_prepared(prepared, smollm, recipe, "some/model")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_an_inspection_fits_the_terminal_and_tells_all(inspected, width):
    text = shown_on(width, inspected)
    assert max(map(len, text.splitlines())) <= width
    flat = " ".join(text.split())
    for said in ("faults", "no answer", "rows.jsonl:21", "length of an example", "⟦[b]word[/b]"):
        assert said in flat
    assert "a run would stop at this data: too long" in flat
    assert "\x1b" not in text, "data must not steer the terminal"
    assert "\\x1b[2J" in flat


def test_what_a_step_is_made_of_depends_on_where_it_runs():
    def step(lengths, **values):
        return length_lines(measure(lengths, 100, 4, 8, **values))[1]

    assert step([50] * 8) == (
        "a step of 8 examples is 2 micro-batches of 4 examples (0% padding) on a CPU; on a GPU "
        "1 micro-batch of up to 400 tokens, packed (a CPU packs above 10% padding)"
    )
    assert re.search(
        r"is 1 micro-batch of up to 400 tokens, packed; unpacked, 2", step([9, 90] * 4)
    )
    assert "pack" not in step([9, 90] * 4, packing=False)


def test_without_color_the_brackets_and_bars_stay(inspected, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown_on(80, inspected, force_terminal=True)
    assert "<|im_end|>" in text
    assert "⟧" in text
    assert "█" in text
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]", text), "a color in spite of NO_COLOR"


def test_the_middle_of_a_long_run_is_left_out_and_counted(smollm, chat):
    (example,) = encode(smollm, chat("a?", " ".join(map(str, range(400)))))
    parts = list(token_texts(smollm, example))
    text = token_text(parts, 100).plain
    kept = re.search(r"⟦0 1 2 .* \[… (\d+) tokens …\] .* 399<\|im_end\|>⟧$", text, re.DOTALL)
    assert kept
    assert len(text) < 350
    assert 0 < int(kept[1]) < example.trained_tokens
