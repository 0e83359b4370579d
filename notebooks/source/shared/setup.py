# %% [markdown]
# ---
# ## 1 · Set-up
#
# **The one choice.** `small` fine-tunes SmolLM2-135M, a real chat model of 135 million
# parameters, on a plain CPU in about a minute; every cell of this page was executed that way.
# `full` takes `FULL_MODEL` on a GPU: Qwen3-4B, Llama-2-7b-chat, or any chat model you name. The
# cells are the same. Read the page once with `small`, then set `full`, put your own data in, and
# run it again.
#
# Qwen3-4B needs no login and suits a free T4: that GPU has no bfloat16, and Qwen3's layers run in
# float16 with lorakit's kernels. For Qwen3.5 take a GPU with bfloat16 (L4, A100, newer).

# %% tags=["setting"]
PROFILE = "small"  # @param ["small", "full"]
DATA_FROM = "example"  # @param ["example", "upload", "drive", "hub"]
KEEP_IN_DRIVE = False  # @param {type:"boolean"}

FULL_MODEL = "Qwen/Qwen3-4B-Instruct-2507"  # @param ["Qwen/Qwen3-4B-Instruct-2507", "meta-llama/Llama-2-7b-chat-hf"] {allow-input: true}

MODEL = {"small": "demo", "full": FULL_MODEL}[PROFILE]
SOURCE = "git+https://github.com/<your-username>/Auto-RL"  # where lorakit is installed from

# %% [markdown]
# **Install.** Everything this kernel has loaded already, and torch and numpy in any case, keeps
# its version: it is written into a *constraints* file, which pip may not overrule. So nothing is
# downgraded, and the kernel need not be restarted. Where lorakit is installed, nothing happens.

# %%
import importlib.metadata as metadata
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

if importlib.util.find_spec("lorakit"):
    print("lorakit", metadata.version("lorakit"), "is installed")
else:
    loaded = {name.partition(".")[0] for name in sys.modules} | {"torch", "numpy"}
    by_module = metadata.packages_distributions()
    kept = sorted({package for name in loaded for package in by_module.get(name, [])})
    lines = [f"{package}=={metadata.version(package)}" for package in kept]
    # The versions that were tried together; all that is loaded is left as it is.
    tried = ["peft==0.21.2", "trl==1.16.0", "bitsandbytes==0.50.2", "datasets==5.2.0"]
    lines += [pin for pin in tried if pin.partition("==")[0] not in kept]
    with tempfile.TemporaryDirectory() as folder:
        constraints = pathlib.Path(folder, "constraints.txt")
        constraints.write_text("\n".join(lines))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
        subprocess.run([*pip, f"lorakit[gguf] @ {SOURCE}"], check=True)
    importlib.invalidate_caches()
    changed = [
        line for line in lines[: len(kept)] if metadata.version(line.split("==")[0]) not in line
    ]
    print("installed; changed under the kernel's feet:", ", ".join(changed) or "nothing")

# %% [markdown]
# **Is this machine fit for it?** `doctor` looks at Python, the driver, torch, bitsandbytes (the
# library that holds 4-bit weights), memory, disk and versions. Each line that is not in order
# comes with the command that mends it.

# %% tags=["machine"]
found = subprocess.run(
    [sys.executable, "-m", "lorakit", "doctor"], capture_output=True, text=True, check=False
)
print(found.stdout or found.stderr)

# %% [markdown]
# **Log in, only if it is needed.** Some models are *gated*: their owner wants to know who you
# are. Ask for access on the model's page, make a token (read access is enough), and paste it when
# you are asked. It is kept by the hub's own library, never by a recipe, a log or a checkpoint.

# %%
import os

GATED = ("meta-llama/", "google/gemma", "mistralai/")
if MODEL.startswith(GATED) and os.environ.get("HF_HUB_OFFLINE") != "1":
    from huggingface_hub import get_token, login

    if get_token() is None:
        login()
else:
    print(f"{MODEL} needs no login")

# %% [markdown]
# **Where results go.** A Colab session forgets its disk. With `KEEP_IN_DRIVE` they go to Google
# Drive; space is looked at first. Elsewhere they go beside this page.

# %%
import shutil

IN_COLAB = (
    importlib.util.find_spec("google.colab") is not None if "google" in sys.modules else False
)
if KEEP_IN_DRIVE and IN_COLAB:
    from google.colab import drive

    drive.mount("/content/drive")
    OUTPUT = pathlib.Path("/content/drive/MyDrive/lorakit")
else:
    OUTPUT = pathlib.Path("runs")
OUTPUT.mkdir(parents=True, exist_ok=True)
NEEDED_GB = {"small": 2, "full": 20}[PROFILE]  # adapter and checkpoints, a merged copy, a GGUF file
free_gb = shutil.disk_usage(OUTPUT).free / 1e9
assert free_gb > NEEDED_GB, f"{OUTPUT}: {free_gb:.0f} GB are free, {NEEDED_GB} are needed"
print(f"{OUTPUT}: there is room for {NEEDED_GB} GB")

# %% [markdown]
# **Exercise.** Ask about a model that you have no access to, `lorakit doctor --model NAME`: what is
# found, and which command mends it?

# %% tags=["setting"]
import json
import logging
import math
import warnings
from importlib.resources import files

warnings.filterwarnings("ignore")
import matplotlib.pyplot as plt
import torch
import transformers

import lorakit

torch.manual_seed(0)
plt.rcParams.update(
    {"figure.figsize": (7, 3), "axes.spines.top": False, "axes.spines.right": False}
)
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def bars(title, rows, unit="", digits=2):
    """A horizontal bar for each name, with its number."""
    _, axes = plt.subplots(figsize=(7, 0.6 + 0.3 * len(rows)))
    axes.bar_label(
        axes.barh(list(rows), list(rows.values())), fmt=f"{{:,.{digits}f}} {unit}", padding=4
    )
    axes.set(title=title, xticks=[])
    axes.margins(x=0.15)
    axes.invert_yaxis()
    plt.show()
