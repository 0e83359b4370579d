"""The converted model is the one in the GGUF file, and its tokenizer that of its training."""

import gguf
import numpy as np
import pytest

from lorakit.model.gguf_to_hf import _rotary_halves, convert_gguf


def test_rotary_pairs_become_two_halves():
    """Two heads of four rows: within a head, rows 0 2 1 3 of the file's order are wanted."""
    rows = np.arange(8, dtype=np.float32)[:, None]
    assert _rotary_halves(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_it_answers_a_plain_question(demo_model, smollm2_tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    from lorakit.inference.generate import GenerationSettings, replies
    from lorakit.types import Message

    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    settings = GenerationSettings(max_new_tokens=12, temperature=0.0)
    question = [Message("user", "What is the capital of France?")]
    assert replies(model, smollm2_tokenizer, [question], settings) == [
        "The capital of France is Paris."
    ]


# Ids that llama.cpp's own tokenizer gives for these texts on the same GGUF file (xllamacpp
# 2026.10.11549). All of 50 Python files and 1,500 random texts agreed; these are the telling kinds.
LLAMA_CPP_IDS = {
    "x =  512": [104, 446, 256, 37, 33, 34],
    "a\n    12\n": [81, 2367, 33, 34, 198],
    "if x:\n\t\treturn 10 ** 3": [342, 1792, 42, 3354, 197, 5406, 216, 33, 32, 1903, 216, 35],
    "we'll pay  2024.": [677, 3060, 2290, 256, 34, 32, 34, 36, 30],
    "<|im_start|>user\n7<|im_end|>\n": [1, 4093, 198, 39, 2, 198],
    "٣ ३ ½ 5²": [164, 113, 216, 9310, 119, 216, 16738, 216, 37, 19133],
    "café 中文 🙂": [83, 1939, 2756, 216, 28589, 29184, 47526],
}


@pytest.mark.parametrize("text", LLAMA_CPP_IDS)
def test_it_tokenizes_as_llama_cpp_does(text, smollm2_tokenizer):
    assert smollm2_tokenizer(text)["input_ids"] == LLAMA_CPP_IDS[text]
    assert smollm2_tokenizer.decode(LLAMA_CPP_IDS[text]) == text


def test_padding_is_not_the_end_of_turn(smollm2_tokenizer):
    assert (smollm2_tokenizer.eos_token, smollm2_tokenizer.pad_token) == (
        "<|im_end|>",
        "<|endoftext|>",
    )
    assert smollm2_tokenizer.model_max_length == 8192


def test_the_chat_template_came_along(smollm2_tokenizer):
    turn = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = smollm2_tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_another_kind_of_gguf_is_refused_and_leaves_nothing(tmp_path):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tokenizer_pre("qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"qwen3.*expected \('llama', 'smollm'\)"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
