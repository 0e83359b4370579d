"""Runs with random adapters on tiny random bases, made without training: one per variant."""

import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tests import made_runs

from lorakit.data.dataset import write_validation
from lorakit.export.tuned_run import Job, open_source
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir
from lorakit.types import Conversation, Message, Origin

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# As Qwen3's: with thinking switched off, the prompt ends with an empty thought.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
BOTH = ["q_proj", "embed_tokens", "lm_head"]
# name -> (model type, config values, recipe values)
VARIANTS = {
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "tied, head adapted": ("llama", {"tie_word_embeddings": True}, {"target_modules": BOTH}),
    "tied, head trained": (
        "llama",
        {"tie_word_embeddings": True},
        {"modules_to_save": ["lm_head"]},
    ),
    "added tokens": ("llama", {"extra_tokens": 2, "vocab_padding": 62}, {}),
    "rslora": ("llama", {}, {"use_rslora": True}),
    "dora": ("llama", {}, {"use_dora": True}),
    "patterns": (
        "llama",
        {},
        {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"q_proj": 32.0}},
    ),
    "biases, rope scaling": (
        "llama",
        {"attention_bias": True, "rope_parameters": LLAMA3_ROPE},
        {"bias": "all"},
    ),
    "modules_to_save": ("llama", {}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "sliding window": ("mistral", {"sliding_window": 128}, {}),
    "several stops": ("qwen3", {"head_dim": 16, "stops": [2, 0, 7], "template": THINKING}, {}),
    "qlora": ("llama", {}, {"method": "qlora"}),
}
CHATS = [
    [("user", "What color is box 3?"), ("assistant", "It is red.")],
    [("system", "Be brief."), ("user", "What color is box 12, and why?"), ("assistant", "Blue.")],
    [("user", "Hi"), ("assistant", "Hello."), ("user", "And 1 + 12?"), ("assistant", "13")],
]


def make_base(folder, tokenizer, model_type, values, seed=0):
    """A random model of this type with SmolLM2's tokenizer, as a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    values = {**SHAPE, **values}
    own = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    own.add_special_tokens(
        {
            "additional_special_tokens": [
                f"<|new_{i}|>" for i in range(values.pop("extra_tokens", 0))
            ]
        }
    )
    stops = values.pop("stops", [own.eos_token_id])
    own.chat_template = values.pop("template", own.chat_template)
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(own) + values.pop("vocab_padding", 0),
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        **values,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        # Random weights of the usual size would predict all tokens alike: nothing to compare.
        parameter.data.mul_(4.0) if "norm" not in name else None
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3)
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=own.pad_token_id)
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def make_run(folder, base, size=0.3, seed=1, **values):
    """A finished run whose adapter holds random numbers of about `size`."""

    def fill(model):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if "lora_B" in name or "lora_embedding_A" in name:
                    parameter.normal_(0, size / 4)
                elif "lora_" not in name:
                    parameter.add_(torch.randn_like(parameter) * size / 10)

    run = made_runs.make_run(folder, base, fill, seed, **values)
    chats = [
        Conversation(tuple(Message(r, t) for r, t in chat), Origin("chats", i + 1))
        for i, chat in enumerate(CHATS)
    ]
    write_validation(run.validation, chats)
    return run


def poisoned(run, folder, value):
    """A copy of a run with `value` as one element of one tensor."""
    shutil.copytree(run.path, folder)
    copy = RunDir(folder)
    tensors = load_file(copy.adapter / ADAPTER_WEIGHTS)
    name = next(n for n in tensors if "down_proj.lora_B" in n)
    tensors[name][5, 1] = value
    save_file(tensors, copy.adapter / ADAPTER_WEIGHTS)
    (copy.adapter / "MANIFEST.json").unlink()
    return copy


def _variants(tokenizer, folders):
    made = {}

    def build(name):
        if name not in made:
            folder = folders.mktemp("variant")
            model_type, config, values = VARIANTS[name]
            base = make_base(folder / "base", tokenizer, model_type, dict(config))
            made[name] = make_run(folder / f"tuned-{len(made)}", base, **values)
        return made[name]

    return build


@pytest.fixture(scope="session")
def variant_run(tokenizer, tmp_path_factory):
    """`variant_run(name)`: the run of that variant, made once."""
    return _variants(tokenizer, tmp_path_factory)


@pytest.fixture(scope="session")
def gguf_run(smollm2_tokenizer, tmp_path_factory):
    """The same with all words of SmolLM2's tokenizer: llama.cpp knows no other one."""
    return _variants(smollm2_tokenizer, tmp_path_factory)


@pytest.fixture
def job(tmp_path):
    """`job(run, **options)`: an export of that run into a folder of its own."""

    def build(run, name="out", **options):
        return Job(open_source(run), tmp_path / name, Console(quiet=True), **options)

    return build


def decided(reference, lead):
    """(Share of positions, share of answers) that no rounding below `lead` nats can turn.

    Of a random model's two best tokens the first leads by 4e-4 nats at times: which one a CPU
    takes there says nothing of a file, and all after it follows.
    """
    sure = []
    for rows in reference.predictions:
        best = rows.topk(2).values
        sure.append(bool((best[:, 0] - best[:, 1]).min() > lead))
    lengths = [len(rows) for rows in reference.predictions]
    kept = sum(n for n, well in zip(lengths, sure, strict=True) if well)
    return kept / sum(lengths), sum(sure) / len(sure)


def read_json(path):
    return json.loads(path.read_text())
