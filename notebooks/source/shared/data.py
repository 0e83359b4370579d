# %% [markdown]
# ---
# ## 2 · Data
#
# A language model predicts the next *token* (a word or a piece of one). Fine-tuning shows it
# conversations and raises the probability of the answers' tokens. So the data is questions with
# answers; **what stands in the answers is what the model will say**, its facts and its manner.
#
# The example: 240 questions about an invented harbor town. No model can know the answers, so
# whatever it gets right, it learned here. They are written in three forms as they occur in
# practice, and a long text is laid beside them.

# %%
my_data = pathlib.Path("my_data")
my_data.mkdir(exist_ok=True)
if DATA_FROM == "example":
    shipped = files("lorakit").joinpath("assets/demo_train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in shipped]
    asked = [(row["instruction"], row["response"]) for row in rows]
    alpaca = [json.dumps({"instruction": q, "output": a}) for q, a in asked[:80]]
    (my_data / "alpaca.jsonl").write_text("\n".join(alpaca))
    sharegpt = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for q, a in asked[80:160]
    ]
    (my_data / "sharegpt.json").write_text(json.dumps(sharegpt))
    openai = [
        json.dumps(
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        )
        for q, a in asked[160:]
    ]
    (my_data / "openai.jsonl").write_text("\n".join(openai))
elif DATA_FROM == "upload" and IN_COLAB:
    from google.colab import files as dialog

    for name, content in dialog.upload().items():
        (my_data / pathlib.Path(name).name).write_bytes(content)
elif DATA_FROM == "upload":
    print(f"put your files into {my_data}/ (.jsonl, .json, .csv, .parquet, .txt), then run on")
elif DATA_FROM == "drive":
    my_data = pathlib.Path("/content/drive/MyDrive/my_data" if IN_COLAB else "drive/my_data")
print(*sorted(f"{p.name:15} {p.stat().st_size:7,} bytes" for p in my_data.glob("*")), sep="\n")

# %%
if DATA_FROM == "hub":
    DATA = "tatsu-lab/alpaca"  # any data set of the hub with one of the known forms
else:
    DATA = sorted(str(path) for path in my_data.glob("*"))
    assert DATA, f"{my_data}/ is empty"
# Held out: questions that training never sees. The example brings its own, worded differently.
HELD_OUT = {"val_data": "demo:heldout"} if DATA_FROM == "example" else {"val_size": 0.05}

# %% [markdown]
# **Normalize and inspect.** Each file's form is found by its columns, and every row becomes the
# same thing: turns of a system, a user and an assistant. What is wrong with a row is counted and
# named: empty answers, broken letters, duplicates, rows that are too long.

# %%
inspected = lorakit.inspect(
    model=MODEL,
    method=METHOD,
    data=DATA,
    cutoff_len=256 if PROFILE == "small" else 2048,
    **HELD_OUT,
)
print(str(inspected).partition("\nlength of")[0])

# %% [markdown]
# **Look at it.** Below is one example exactly as the model reads it. Only the tokens between ⟦ and
# ⟧ are *trained*: they carry *loss*, the price for each token that was not foreseen. Question
# and system prompt are read, not learned; the sign that ends the answer is trained too, which is
# how a model learns to stop.

# %%
inspected.shown[0]

# %%
report, lengths = inspected.report, inspected.lengths
print(
    f"{report.trained_tokens_train:,} of {report.tokens_train:,} tokens are trained ({report.trained_share:.0%})"
)
bars(
    "length of an example in tokens",
    {f"{bar.begin}-{bar.end}": bar.count for bar in lengths.bars},
    digits=0,
)

# %% [markdown]
# **Chunk long texts.** A document longer than `cutoff_len` is cut where a paragraph or a sentence
# ends, and with `documents: instruction` each piece becomes the answer to a request, so that a
# chat model takes up the text without forgetting how to chat.

# %%
story = pathlib.Path("a_long_text.txt")
story.write_text(
    "\n\n".join(
        f"# Day {day}\n\n" + " ".join(answer.removeprefix("Aye, ") for _, answer in asked[day::40])
        for day in range(1, 9)
    )
    if DATA_FROM == "example"
    else "A paragraph of your own.\n\n" * 200
)
pieces = lorakit.inspect(
    model=MODEL, method=METHOD, data=str(story), documents="instruction", cutoff_len=160, val_size=0
)
print(f"{len(story.read_text()):,} characters became {pieces.report.examples_train} examples")
pieces.shown[0]

# %% [markdown]
# **Exercises.** (1) Delete the answer of one row in `my_data/alpaca.jsonl` and inspect again: what
# is counted, and which row is named? (2) Set `train_on="all"`: which share of the tokens is trained
# now, and what would the model learn that you do not want? (3) Make one row ten times as long:
# what happens to the share of padding?
