"""Train on a GPU of Modal: modal run cloud/modal_app.py --recipe recipe.yaml --data my.jsonl.

The run directory is kept in a volume; the same command goes on with a run that was stopped.
"""

import subprocess
from pathlib import Path

import modal

ROOT = Path(__file__).parents[1]
image = (
    modal.Image.debian_slim(python_version="3.12")
    .apt_install("gcc", "libc6-dev")
    .pip_install("torch==2.13.0")
    .add_local_dir(
        ROOT, "/src", copy=True, ignore=[".git", ".venv", "runs", "notebooks", "tests", "site"]
    )
    .run_commands("pip install -c /src/constraints.txt /src")
)
volume = modal.Volume.from_name("lorakit", create_if_missing=True)
app = modal.App("lorakit", image=image)


@app.function(gpu="L4", timeout=12 * 3600, volumes={"/vol": volume}, retries=2)
def train(name: str, recipe: str, rows: str) -> None:
    """Train in the volume; a retry after a lost machine resumes."""
    folder = Path("/vol") / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "data.jsonl").write_text(rows)
    run = folder / "run"
    command = ["lorakit", "train", str(folder / "recipe.yaml"), "--output", str(run)]
    command += ["--data", str(folder / "data.jsonl")]
    if run.exists():
        command.append("--resume")
    try:
        subprocess.run(command, check=True)
    finally:
        volume.commit()


@app.local_entrypoint()
def main(recipe: str, data: str, name: str = "first") -> None:
    """Send the recipe and the data, and train; fetch the result with `modal volume get lorakit`."""
    train.remote(name, Path(recipe).read_text(), Path(data).read_text())
