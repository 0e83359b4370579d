# %% [markdown]
# ---
# ## 8 · Evaluation
#
# *Held-out* questions were never trained on. Their perplexity, of the base and of the tuned model:

# %% tags=["run"]
result = run.evaluate(samples=4)
print(
    f"held-out perplexity: base {result.base.perplexity:.2f}, tuned {result.tuned.perplexity:.2f}, over {result.tuned.tokens:,} tokens"
)
assert result.tuned.perplexity < result.base.perplexity
bars(
    "held-out loss, nats a token (lower is better)",
    {"base": result.base.loss, "tuned": result.tuned.loss},
    digits=3,
)

# %% [markdown]
# A number is not an answer. Side by side, greedy (the most probable token each time):

# %% tags=["run"]
for sample in result.samples:
    print(f"Q      {sample.prompt}")
    print(f"base   {sample.base[:200]!r}")
    print(f"tuned  {sample.tuned[:200]!r}")
    print(f"right  {sample.reference!r}\n")

# %% [markdown]
# **Talk to it.** Change the questions; `base=True` asks the untouched model. In a terminal:
# `lorakit chat RUN`.

# %% tags=["run"]
QUESTIONS = ["What is the lighthouse called?", "I am hungry. What should I try in Quillhaven?"]
for question in QUESTIONS:
    print(f"> {question}\n{run.chat(question, temperature=0.0, max_new_tokens=60)}\n")

# %% [markdown]
# **Exercises.** (1) Ask about something else entirely, "Write a haiku": what has the training
# done to the rest of the model? (2) Evaluate on rows of your own: `run.evaluate("my.jsonl")`.
# (3) Perplexity is a mean. Find a held-out question that the tuned model gets wrong all the same.
