"""Convert SmolLM2's GGUF file to a folder that transformers loads.

Tensors are read with gguf-py and renamed. The GGUF loader of transformers (5.17 to 5.23) takes 17 s
for the same file, drops the digit splitter of the tokenizer (15 of 80 Python files then tokenize
differently) and returns a model that cannot be saved ("quantized with gguf").
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

# GGUF's names and Llama's; layer tensors have the prefixes `blk.N.` and `model.layers.N.`.
MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The file pads with the end-of-turn token, and a mask made from pad ids would then hide that token.
# <|endoftext|> is reserved: it ends documents in pretraining and never occurs in a chat.
PAD = "<|endoftext|>"
CONTROL_TOKEN = 3


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model of `gguf` in bf16, its tokenizer and chat template to `folder`, mode 0644.

    Raises:
        OSError: `folder` cannot be written.
        ValueError: the file is not a SmolLM2 (a Llama with the `smollm` pre-tokenizer).
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    actual = (_value(reader, "general.architecture"), _value(reader, "tokenizer.ggml.pre"))
    expected = ("llama", "smollm")
    if actual != expected:
        raise ValueError(
            f"{gguf.name}: architecture and tokenizer are {actual}, expected {expected}"
        )
    folder.mkdir(parents=True)
    _write_weights(reader, folder / "model.safetensors")
    _write_configs(reader, folder)
    _write_tokenizer(reader, folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file lacks {key}")
    return field.contents()


def _write_weights(reader: GGUFReader, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(_tensors(reader)), path, metadata={"format": "pt"})
    except SafetensorError as error:
        # safetensors reports a full disk as a SafetensorError; callers expect OSError.
        raise OSError(str(error)) from error


def _tensors(reader: GGUFReader) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each weight [out, in] with transformers' name, dequantized and rounded to bf16."""
    import torch
    from gguf.quants import dequantize

    heads = {
        "attn_q": _value(reader, "llama.attention.head_count"),
        "attn_k": _value(reader, "llama.attention.head_count_kv"),
    }
    for tensor in reader.tensors:
        *prefix, module, _ = tensor.name.split(".")
        weight = dequantize(tensor.data, tensor.tensor_type)
        if module in heads:
            weight = _rotary_halves(weight, heads[module])
        name = f"model.layers.{prefix[1]}.{LAYER_NAMES[module]}" if prefix else MODEL_NAMES[module]
        yield f"{name}.weight", torch.from_numpy(weight.copy()).to(torch.bfloat16)


def _rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rotary pairs (0, 1), (2, 3), ... of GGUF to the two halves that transformers uses."""
    out, width = weight.shape
    pairs = weight.reshape(heads, out // heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)


def _write_configs(reader: GGUFReader, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    def of(key: str) -> Any:
        return _value(reader, f"llama.{key}")

    ids = {
        "bos_token_id": _value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _value(reader, "tokenizer.ggml.tokens").index(PAD),
    }
    config = LlamaConfig(
        vocab_size=of("vocab_size"),
        hidden_size=of("embedding_length"),
        intermediate_size=of("feed_forward_length"),
        num_hidden_layers=of("block_count"),
        num_attention_heads=of("attention.head_count"),
        num_key_value_heads=of("attention.head_count_kv"),
        max_position_embeddings=of("context_length"),
        # GGUF stores it as float32: 1e-5 is read as 9.999999747378752e-06.
        rms_norm_eps=round(of("attention.layer_norm_rms_epsilon"), 9),
        rope_parameters={"rope_type": "default", "rope_theta": of("rope.freq_base")},
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **ids,
    )
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    """Write a byte-level BPE that first splits off each digit, as llama.cpp's `smollm` does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = _value(reader, "tokenizer.ggml.tokens")
    token_types: list[int] = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in _value(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        token
        for token, token_type in zip(tokens, token_types, strict=True)
        if token_type == CONTROL_TOKEN
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    config = {
        "add_prefix_space": False,
        "bos_token": tokens[_value(reader, "tokenizer.ggml.bos_token_id")],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[_value(reader, "tokenizer.ggml.eos_token_id")],
        "model_max_length": _value(reader, "llama.context_length"),
        "pad_token": PAD,
        # Known to transformers 4 and 5; 5 itself would write TokenizersBackend.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[_value(reader, "tokenizer.ggml.unknown_token_id")],
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    template = _value(reader, "tokenizer.chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
