"""Table of known issues with their symptom, cause and fix.

`doctor/checks.py` detects all but those with `see`, which the named command shows. The check fills
in the braces.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KnownIssue:
    """One issue; `command` fixes it, and `see` names the command that shows it if no check does."""

    symptom: str
    cause: str
    command: str
    see: str | None = None


TROUBLES: dict[str, KnownIssue] = {
    "python": KnownIssue(
        "lorakit cannot be installed, or fails with a syntax error",
        "Python {found} is too old, expected at least 3.11",
        "python3.12 -m venv .venv && .venv/bin/pip install lorakit",
    ),
    "driver": KnownIssue(
        "the GPU is not found",
        "nvidia-smi fails: {found}",
        "sudo apt-get install --reinstall nvidia-driver-580 && sudo reboot",
    ),
    "torch": KnownIssue(
        "import torch fails",
        "{found}",
        "pip install --force-reinstall --no-cache-dir torch==2.13.0",
    ),
    "cpu_torch": KnownIssue(
        "training runs on the CPU though there is a GPU",
        "torch {found} is a CPU build, and this machine has {card}",
        "pip install --force-reinstall torch==2.13.0 --index-url "
        "URL (the URL for CUDA {cuda} from pytorch.org/get-started)",
    ),
    "old_driver": KnownIssue(
        "CUDA error: the provided PTX was compiled with an unsupported toolchain",
        "torch was built for CUDA {found}, the driver serves CUDA {cuda}",
        "pip install --force-reinstall torch==2.13.0 --index-url "
        "URL (the URL for CUDA {cuda} from pytorch.org/get-started), or update the driver",
    ),
    "hidden_gpu": KnownIssue(
        "training runs on the CPU though there is a GPU",
        "CUDA_VISIBLE_DEVICES={found} hides every GPU",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "no_cuda": KnownIssue(
        "torch.cuda.is_available() is False",
        "a CUDA build of torch and a driver are installed, but torch finds no GPU: {found}",
        "nvidia-smi && sudo modprobe nvidia_uvm",
    ),
    "capability": KnownIssue(
        "CUDA error: no kernel image is available for execution on the device",
        "{card} has compute capability {found}; this torch was built for {built}",
        "pip install --force-reinstall torch==2.13.0 --index-url "
        "URL (a build from pytorch.org/get-started that lists sm_{sm})",
    ),
    "bitsandbytes": KnownIssue(
        "`method: qlora` fails, or freezes at the start",
        "bitsandbytes does not work here: {found}",
        "pip install --force-reinstall 'bitsandbytes>=0.50.2'",
    ),
    "triton": KnownIssue(
        "the fused layers are not used",
        "triton cannot be imported: {found}",
        "pip install 'triton>=3.6,<3.10'",
    ),
    "no_bf16": KnownIssue(
        "float16 with loss scaling instead of bfloat16",
        "{card} (compute capability {found}) lacks bfloat16, which is not an error",
        "lorakit plan RECIPE --gpu t4",
    ),
    "card_in_use": KnownIssue(
        "CUDA out of memory at the start",
        "{found}",
        "nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv",
    ),
    "ram": KnownIssue(
        "the process is killed without a message while the model loads",
        "{found}",
        "lorakit plan RECIPE  (its line `RAM`)",
    ),
    "disk": KnownIssue(
        "No space left on device",
        "{found}",
        "hf cache prune, or: export HF_HOME=/a/larger/disk",
    ),
    "cache": KnownIssue(
        "the model is downloaded each time, or not at all",
        "the model cache {found} cannot be written",
        "export HF_HOME=$PWD/.cache/huggingface",
    ),
    "home": KnownIssue(
        "PermissionError or a read-only file system below ~",
        "the home folder {found} cannot be written",
        "export HOME=$PWD HF_HOME=$PWD/.cache/huggingface",
    ),
    "too_old": KnownIssue(
        "an old package has a known vulnerability or bug",
        "{found}",
        "pip install --upgrade {packages}",
    ),
    "out_of_range": KnownIssue(
        "errors about missing names or unknown arguments",
        "{found}",
        "pip install --upgrade lorakit {packages}",
    ),
    "torchvision": KnownIssue(
        "operator torchvision::nms does not exist, at the import of transformers",
        "{found}",
        "pip uninstall -y torchvision torchaudio",
    ),
    "login": KnownIssue(
        "401, or: this repository is gated",
        "this machine has no token of the hub",
        "hf auth login",
    ),
    "gated": KnownIssue(
        "403, or: this repository is gated",
        "this account has no access to {found} yet",
        "request access on the page of {found}, then: lorakit doctor --model {found}",
    ),
    "no_model": KnownIssue(
        "404: repository not found",
        "{found}: no such model on the hub for this account",
        "hf models ls --search NAME",
    ),
    "hub": KnownIssue(
        "the hub cannot be reached",
        "{found}",
        "hf auth whoami; behind a proxy: export HTTPS_PROXY=ADDRESS",
    ),
    "colab_cpu": KnownIssue(
        "training on Colab takes hours",
        "this Colab runtime has no GPU",
        "Runtime > Change runtime type > T4 GPU",
    ),
    "colab_drive": KnownIssue(
        "the adapter is lost when the Colab session ends",
        "no drive is mounted: files are deleted with the session",
        "from google.colab import drive; drive.mount('/content/drive')",
    ),
    "out_of_memory": KnownIssue(
        "CUDA out of memory in a run",
        "the recipe needs more memory than the GPU has",
        "lorakit plan RECIPE, and take its first change",
        see="lorakit plan",
    ),
    "flat_loss": KnownIssue(
        "the loss does not fall",
        "learning_rate is too low, or the loss mask does not select the answers",
        "lorakit inspect RECIPE, then raise learning_rate",
        see="lorakit inspect",
    ),
    "poor_answers": KnownIssue(
        "answers are poor, ramble or do not end",
        "the chat template differs from training",
        "use the tokenizer in RUN/adapter; lorakit chat RUN does",
        see="lorakit chat",
    ),
}
