"""A small run with a checkpoint in the middle, kept for ever: later versions must resume it.

    python benchmarks/golden.py tests/golden/format_2

tests/test_golden.py resumes each folder there. A new format of checkpoints adds a folder; none is
made again.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import crash


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    crash.import_everything()
    from rich.console import Console

    from lorakit.pipeline import fit
    from lorakit.recipe.loader import load_recipe
    from lorakit.storage.run_dir import RunDir, read_metrics
    from lorakit.train.resume import library_versions

    crash.make_world(folder, width=16)
    os.chdir(folder)
    crash.keep_cache_in(Path("cache").absolute())
    flags = {"model": "./model", "data": "rows.jsonl", "output_dir": "run", "dtype": "float32"}
    flags |= {"lora_r": 2, "lora_alpha": 8, "lora_dropout": 0.1, "micro_batch_size": 4}
    flags |= {"gradient_accumulation_steps": 2, "max_steps": 8, "save_every": 5, "val_size": 2}
    flags |= {"learning_rate": 5e-3, "cutoff_len": 128, "offline": True}
    fit(load_recipe(None, [], flags), Console(stderr=True))
    run = RunDir(Path("run"))
    rows = read_metrics(run)
    expected = {"losses": [row["loss"] for row in rows], "versions": library_versions()}
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(run.checkpoint(8))
    for path in (run.adapter, Path("cache")):
        shutil.rmtree(path)
    for path in (run.eval, run.plan, run.data_report):
        path.unlink()
    for place in Path().rglob("*.json*"):
        place.chmod(0o644)


if __name__ == "__main__":
    main()
