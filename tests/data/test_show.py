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
