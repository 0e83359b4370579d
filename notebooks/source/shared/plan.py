# %% [markdown]
# ---
# ## 5 · Plan
#
# Before anything is downloaded: does it fit? Shapes come from the model's `config.json` alone, and
# every part is counted. Measured against the driver's own figure the plan is 1.2% off in the
# median, 3.1% at worst (13 recipes, one H100).

# %% tags=["run"]
settings = dict(model=MODEL, method=METHOD, data=DATA, **HELD_OUT)
if PROFILE == "small":  # a small model, few rows: larger steps than the defaults
    settings |= dict(lora_r=16, lora_alpha=32, lora_dropout=0.0, learning_rate=2e-3)
    settings |= dict(
        micro_batch_size=8, gradient_accumulation_steps=1, max_steps=45, cutoff_len=256
    )
elif DATA_FROM == "example":
    settings |= dict(max_steps=45)
planned = lorakit.plan(**settings)
assert planned.fits, planned
print(f"fits: {planned.fits}; {planned.trainable:,} of {planned.parameters:,} parameters train")

# %% [markdown]
# Where do the bytes go? Llama-2-7B with 2,048 tokens a row, drawn from the plan. LoRA's 15 GiB are
# its weights in 16 bits and little else. In 4 bits they take a quarter: with a small adapter, one
# row at a time and all recomputed, a little over 6 GiB. The recipe as written has a larger adapter (rank 64) and
# larger batches; within 6 GiB the frozen layers then wait in the computer's own memory and come to
# the card two at a time (*streaming*: the same gradients, to the bit).

# %% tags=["theory"]
PARTS = {
    "frozen weights": "frozen weights",
    "one layer dequantized": "frozen weights",
    "embeddings, head and norms": "embeddings, head, norms",
    "adapters (float32)": "adapter",
    "adapters (copy in the base's type)": "adapter",
    "gradients (float32)": "its gradients",
    "optimizer state": "its optimizer state",
    "CUDA context": "CUDA itself",
}
smallest = dict(lora_r=16, micro_batch_size=1, gradient_checkpointing=True, weight_offload="off")
budgets = {
    "LoRA": dict(method="lora", memory_limit="15GiB"),
    "QLoRA, rank 16": dict(method="qlora", memory_limit="7GiB", **smallest),
    "QLoRA, rank 64": dict(method="qlora", memory_limit="6GiB"),
}
columns = {}
for title, more in budgets.items():
    seven = lorakit.plan(model="llama-2-7b", gpu="a100-80", **more)
    assert seven.fits, title
    columns[title] = {}
    for part, size in seven.training.parts.items():
        part = PARTS.get(part, "activations and work")
        columns[title][part] = columns[title].get(part, 0) + size / 2**30
    print(f"{title:15} {sum(columns[title].values()):5.2f} GiB: {seven.training.describe()}")
figure, axes = plt.subplots(figsize=(7, 3.4))
left = dict.fromkeys(columns, 0.0)
for part in dict.fromkeys(part for column in columns.values() for part in column):
    sizes = [column.get(part, 0.0) for column in columns.values()]
    axes.barh(list(columns), sizes, left=list(left.values()), label=part)
    left = {title: left[title] + size for title, size in zip(columns, sizes, strict=True)}
axes.set(title="training Llama-2-7B, planned", xlabel="GiB")
axes.invert_yaxis()
axes.legend(loc="lower right", fontsize="small")
plt.show()

# %% [markdown]
# **Exercises.** (1) `lorakit.plan(model="llama-2-7b", method=METHOD, gpu="t4")`: what is recomputed
# or moved to make it fit, and what does that cost in speed? (2) Which single setting saves most:
# `lora_r`, `cutoff_len`, `micro_batch_size`? (3) Plan a 70B model for your card.
