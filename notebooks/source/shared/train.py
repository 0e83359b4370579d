# %% [markdown]
# ---
# ## 6 · Training
#
# What the settings are for, and how the two methods differ:
#
# | setting | LoRA | QLoRA | what it does |
# |---|---|---|---|
# | `lora_r` | 16 | 64 | directions of the update; QLoRA gives more, to make up for rounding |
# | `lora_alpha` | 32 | 16 | the update is scaled by alpha / r: 2 and 0.25 |
# | `lora_dropout` | 0.05 | 0.1 | share of the adapter's inputs set to zero at random, against learning by heart |
# | `learning_rate` | 1e-4 | 2e-4 | size of a step; it rises over the first 3% of steps, then falls as a cosine |
# | `micro_batch_size` | 1 | 4 | rows at once: a smaller base leaves room for more |
# | `gradient_accumulation_steps` | 8 | 4 | micro-batches behind one step; memory stays that of one |
# | `cutoff_len` | 2048 | 2048 | longest example in tokens |
#
# The curve is drawn while it trains. Stop the cell if you must: a checkpoint is saved, and running
# the cell again goes on from there, to the same bytes.

# %% tags=["run"]
from lorakit.display.live import live_curve

folder = OUTPUT / f"{PROFILE}-{METHOD}"
with live_curve(folder):
    run = lorakit.finetune(
        settings, output_dir=str(folder), resume=(folder / "recipe.yaml").exists()
    )

# %% tags=["run"]
rows = [row for row in run.metrics if row.get("loss") is not None]
first, last = rows[0], rows[-1]
seconds = sum(row["seconds"] for row in rows)
print(
    f"{last['step']} steps: loss {first['loss']:.2f} -> {last['loss']:.2f}; {last['tokens_per_second']:,.0f} tokens/s at the end"
)
assert last["loss"] < first["loss"]

# %% [markdown]
# What a healthy curve looks like: a quick fall, then a slow one. Flat from the start: the rate is
# too small, or nothing is trained (look at the example in part 2). Falling to zero: the
# rows are learned by heart, which is what this example wants and yours may not; the held-out loss
# below tells. Jumping: the rate is too large.
#
# **Exercises.** (1) `learning_rate` times ten, then divided by ten: which curve is which disease?
# (2) Interrupt the cell in the middle and run it again. Is the curve the same as without?
