# %% [markdown]
# ---
# ## 3 · The template
#
# A chat model saw its conversations in one fixed wrapping: the *chat template*, a small program
# that comes with the tokenizer. Llama-2 writes `[INST] ... [/INST]`, SmolLM2 writes
# `<|im_start|>user ... <|im_end|>`. Trained in one wrapping and asked in another, a model rambles:
# the commonest reason for bad answers after a good training. lorakit takes the model's own
# template for training, chat, export and serving alike, and saves it with the adapter.

# %% tags=["setting"]
from transformers import AutoTokenizer
from lorakit.model.load import locate_model

location = locate_model(lorakit.load_recipe(model=MODEL, data="demo").recipe)
tokenizer = AutoTokenizer.from_pretrained(location)
chat = [
    {"role": "user", "content": "What is the lighthouse called?"},
    {"role": "assistant", "content": "Aye, it is the Amber Needle."},
]
print(tokenizer.apply_chat_template(chat, tokenize=False))

# %% [markdown]
# Asked for an answer, the template ends where the assistant begins to speak
# (`add_generation_prompt`). Its tokens are the beginning of the trained example, to the token:
# otherwise the model would be asked for something it was never shown.

# %%
question = tokenizer.apply_chat_template(
    chat[:1], add_generation_prompt=True, return_dict=True
).input_ids
whole = tokenizer.apply_chat_template(chat, return_dict=True).input_ids
assert whole[: len(question)] == question
print(f"{len(question)} tokens are read, {len(whole) - len(question)} are trained:")
print(repr(tokenizer.decode(whole[len(question) :])))

# %% [markdown]
# **Exercises.** (1) Add a system turn with `"Answer like a pirate."` in front: where does the
# template put it? (2) Some templates refuse a system turn. Which line of
# `tokenizer.chat_template` decides that?
