"""Finished runs made without training, among them models whose every answer is known beforehand.

A random model's answer turns on how a CPU rounds: its best token leads by less than bfloat16 can
tell apart, and any token may be the end of the turn. `make_talker` sets the weights by hand
instead: the next word leads by more than 5 nats wherever it is asked, and no word is a stop token.
"""

import copy
import itertools

import torch

from lorakit.data.chat_template.select import resolve_template
from lorakit.hardware import detect_device
from lorakit.model.base_fingerprint import remember_base
from lorakit.model.load import load_base, load_config, load_tokenizer
from lorakit.model.lora_config import add_adapter, resolve_targets
from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import RunDir
from lorakit.train.checkpoint import save_adapter, saves_embeddings

# What a talker says, by speaker: ten words each, every word one token, said in a ring.
WORDS = {
    name: words.split()
    for name, words in {
        "base": "red green blue gray pink white black brown yellow orange",
        "fruit": "apple banana cherry lemon grape peach pear berry plum olive",
        "animal": "cat dog horse cow pig sheep duck fish bird bear",
    }.items()
}
LIMIT = 2**17  # tokens that a talker reads and writes: more than any test waits for
# Channels of the hidden state, 64 wide: which speaker, the last word of the ring, digits read.
ALWAYS, SPEAKER, PLACE, READ, ASKED = 0, 1, 8, 20, 32


def make_run(folder, base, fill, seed=1, **values):
    """A finished run on `base`; `fill(model)` changes the values of its new adapter."""
    flags = {"model": str(base), "data": "none.jsonl", "offline": True, "dtype": "float32"}
    flags |= {"lora_r": 4, "lora_alpha": 8, **values}
    resolved = load_recipe(None, [], flags)
    resolved = resolve_targets(resolved, load_config(resolved.recipe, str(base)))
    recipe = resolved.recipe
    run = RunDir(folder)
    folder.mkdir(parents=True)
    run.recipe.write_text(resolved.to_yaml())
    torch.manual_seed(seed)
    model = add_adapter(load_base(recipe, str(base), detect_device("float32", "cpu")), recipe)
    with torch.no_grad():
        fill(model)
    own = load_tokenizer(recipe, str(base))
    resolve_template(own, "a base")
    save_adapter(model, own, run.adapter, saves_embeddings(recipe))
    remember_base(run, recipe, str(base))
    return run


def ids_of(tokenizer, speaker):
    """The token of each word, with the space before it."""
    found = [tokenizer(f" {word}")["input_ids"] for word in WORDS[speaker]]
    assert all(len(ids) == 1 for ids in found), found
    return [ids[0] for ids in found]


def answer(speaker, digit, count):
    """What `speaker` says in `count` tokens to a question in which `digit` is the only one."""
    return " ".join(WORDS[speaker][(digit + i) % 10] for i in range(count))


def make_talker(tokenizer, folder):
    """A Llama of one layer that never stops talking, saved into `folder`, which is returned.

    It begins with the word whose number is the digit of the question, and goes on around the ring.
    Where no digit was asked for, all ten words of a speaker are equally likely to be the first.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=LIMIT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    for name, value in state.items():
        if "norm" in name:
            value.fill_(1.0)
    embedding, head = state["model.embed_tokens.weight"], state["lm_head.weight"]
    embedding[:, ALWAYS] = 1.0
    for digit in range(10):
        (token,) = tokenizer(str(digit))["input_ids"]
        embedding[token, READ + digit] = 8.0
    for number, speaker in enumerate(WORDS):
        for place, token in enumerate(ids_of(tokenizer, speaker)):
            embedding[token, PLACE + place] = 3.0
            head[token, PLACE + (place - 1) % 10] = 10.0
            head[token, ASKED + place] = 10.0
            head[token, SPEAKER + number] = 10.0
    layer = "model.layers.0."
    # Queries and keys of zero look at all tokens alike: the mean of the digits read.
    for digit in range(10):
        state[f"{layer}self_attn.v_proj.weight"][digit, READ + digit] = 6.0
        state[f"{layer}self_attn.o_proj.weight"][ASKED + digit, digit] = 1.0
    # The first channel between the two halves of the MLP is a constant, for adapters to weigh.
    state[f"{layer}mlp.gate_proj.weight"][0, ALWAYS] = 1.0
    state[f"{layer}mlp.up_proj.weight"][0, ALWAYS] = 0.1
    state[f"{layer}mlp.down_proj.weight"][SPEAKER, 0] = 0.6
    model.load_state_dict(state)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def talking_run(folder, base, speaker, **values):
    """A run on a talker; its adapter makes it say the words of `speaker`."""

    def fill(model):
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
            if name.endswith("down_proj.lora_A.default.weight"):
                parameter[0, 0] = 1.0
            if name.endswith("down_proj.lora_B.default.weight"):
                parameter[SPEAKER + list(WORDS).index(speaker), 0] = 0.7

    return make_run(folder, base, fill, target_modules=["down_proj"], **values)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TOOL_TEMPLATE = """{% if tools %}<|im_start|>system
You may call functions:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Return each call as
<tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call><|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def calling_run(tokenizer, folder, family="Llama"):
    """A run on a Llama or Qwen2 of one layer whose every answer is the tool call `CALL`."""
    import transformers

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([CALL])
    tokenizer.chat_template = TOOL_TEMPLATE
    (start,) = tokenizer("\n")["input_ids"]
    chain = [start, tokenizer.convert_tokens_to_ids(CALL), tokenizer.eos_token_id]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    state = {
        n: torch.ones_like(v) if "norm" in n else torch.zeros_like(v)
        for n, v in model.state_dict().items()
    }
    for place, (token, following) in enumerate(itertools.pairwise(chain)):
        state["model.embed_tokens.weight"][token, place] = 1.0
        state["lm_head.weight"][following, place] = 2.0  # 16 nats: an adapter shows beside it
    model.load_state_dict(state)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")

    def fill(model):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.2)

    return make_run(folder / "caller", folder / "base", fill)
