"""Train on Kaggle's two T4: paste into a notebook cell, or upload as a script with internet on.

The accelerator is "GPU T4 x2". Both GPUs share each step; /kaggle/working is kept as the output,
so the next session goes on from the last checkpoint of a run that is added as input.
"""

import shutil
import subprocess
import sys
from pathlib import Path

MODEL = "Qwen/Qwen3-4B"
DATA = "demo"  # or a file of a dataset that is added: /kaggle/input/NAME/rows.jsonl
RUN = Path("/kaggle/working/run")
EARLIER = Path("/kaggle/input/run")  # the output of an earlier session, if it was added


def main() -> None:
    """Install lorakit, and train or go on."""
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "lorakit"], check=True)
    if EARLIER.exists() and not RUN.exists():
        shutil.copytree(EARLIER, RUN)
    command = ["lorakit", "train", "--model", MODEL, "--data", DATA, "--method", "qlora"]
    # A session is cut after 12 hours: save by the clock.
    command += ["--output", str(RUN), "--gpus", "2", "--set", "save_every=10min"]
    if RUN.exists():
        command.append("--resume")
    subprocess.run(command, check=True)
    subprocess.run(["lorakit", "export", str(RUN), "--to", "adapter"], check=True)


if __name__ == "__main__":
    main()
