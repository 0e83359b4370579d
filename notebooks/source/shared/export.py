# %% [markdown]
# ---
# ## 9 · Export
#
# | form | what it is | use it for |
# |---|---|---|
# | adapter | $A$ and $B$ alone, PEFT's own format | many tasks on one base, vLLM |
# | merged | $W + sBA$ as a whole model | any program that loads transformers models |
# | GGUF | one file, quantized if you like | llama.cpp: laptops, phones, no Python |
# | Ollama | the GGUF file with the chat template as a Modelfile | `ollama run` |
#
# Each export is loaded again after writing and must predict what the adapter predicts; the figure
# is the *KL divergence*, how far the two opinions on the next token lie apart (0: the same).

# %% tags=["run"]
print(*sorted(f"{p.name:28} {p.stat().st_size:12,} bytes" for p in run.adapter.iterdir()), sep="\n")


def export(to, **options):
    """Export anew each time this cell runs."""
    for old in (run.path / "export").glob(f"{to}*"):
        shutil.rmtree(old)
    return run.export(to, **options)


merged = export("merged")
# Rounding the sum to 16 bits takes a small part of what the adapter changes at all.
assert merged.get("kl_per_token", 0) < 0.1 * merged.get("base_kl_per_token", 1)

# %% [markdown]
# The Ollama folder holds the GGUF file and a Modelfile whose template was derived from the model's
# own and compared with it. (GGUF alone: `run.export("gguf", quant="Q4_K_M")`.)

# %% tags=["run"]
if importlib.util.find_spec("xllamacpp"):  # comes with lorakit[gguf]
    ollama = export("ollama", quant="Q8_0")
    print(pathlib.Path(ollama["path"], "Modelfile").read_text())
else:
    print("pip install 'lorakit[gguf]' for GGUF and Ollama")

# %% [markdown]
# **The hub**, if you want it there: log in first, then name a repository. It is private unless you
# say `public=True`, and the model card says how it was made.

# %%
HUB_REPOSITORY = ""  # @param {type:"string"}
if HUB_REPOSITORY:
    run.export("hub", repo=HUB_REPOSITORY)

# %% [markdown]
# **Exercises.** (1) Export with `dtype="bfloat16"` and with `"float32"`: how far apart are the KL
# figures, and why? (2) Quantize to `Q4_K_M`: how much of the training survives?
#
# ---
# ## 10 · Deployment
#
# ```bash
# ollama create town -f runs/NAME/export/ollama-Q8_0/Modelfile && ollama run town
# vllm serve BASE --enable-lora --lora-modules mine=runs/NAME/adapter     # many requests, one base
# lorakit serve runs/NAME                                                 # OpenAI's routes, this machine
# ```
#
# Or in any Python program, without lorakit:

# %% tags=["run"]
from peft import PeftModel

if PROFILE == "small":
    plain = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(run.adapter)).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    made = plain.generate(**prompt, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(made[0, prompt.input_ids.shape[1] :], skip_special_tokens=True))

# %% [markdown]
# Keep the adapter apart when several tasks share a base, merge when there is one. The template that
# was trained with travels in `adapter/`: use that tokenizer, and the answers stay what they are here.
#
# **Exercises.** (1) Ask the Ollama model the questions of part 8: are the answers the same? (2) Train
# a second adapter on other data and serve both on one base: `lorakit serve runs/ONE runs/TWO`.
#
# **Further reading.** LoRA, arXiv 2106.09685 · QLoRA, arXiv 2305.14314 · the PEFT and TRL
# documentation · this project's `docs/guides`.
