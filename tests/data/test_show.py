"""What is trained is visible without color."""

from lorakit.data.show import MASKED, render_example
from lorakit.data.template import encode


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
    import io

    from rich.console import Console

    from lorakit.data.show import show_report
    from lorakit.records import DataReport, Fault

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
    stream = io.StringIO()
    show_report(report, Console(file=stream, width=200))
    text = stream.getvalue()
    assert "source a.jsonl, format text, rows 9" in text
    assert "6 to train on, 2 held out; 40 of 100 tokens trained (40%); longest 31 of 64" in text
    assert "1 x empty [answer]: left out (a.jsonl:4)" in text
