"""Train runs with real mistakes on the demo model, and open their pages in a browser.

python benchmarks/ui_bad_runs.py FOLDER --screenshots SHOTS --output benchmarks/results/x.json

Mistakes: a loss mask with the questions, a learning rate 50 times too high, data of a dozen
repeated rows with the held-out ones among them, question and answer swapped. FOLDER keeps the
runs, so that somebody who does not know lorakit can be asked what is wrong with each.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

from playwright.sync_api import sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
STEPS = 20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--screenshots", type=Path)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    for name, recipe in recipes(given.folder, given.steps).items():
        if not (given.folder / "runs" / name / "adapter").exists():
            train(given.folder, name, recipe)
    result = {"date": time.strftime("%Y-%m-%d"), "steps": given.steps, **pages(given)}
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


def recipes(folder, steps):
    """Write the data; return the settings of each run by a name that does not give it away."""
    folder.mkdir(parents=True, exist_ok=True)
    assets = files("lorakit") / "assets"
    rows, held = (
        [json.loads(line) for line in (assets / f"demo_{part}.jsonl").read_text().splitlines()]
        for part in ("train", "heldout")
    )
    written = {
        "few": rows[:12] * 20,
        "few_held": rows[:12],
        "swapped": [swapped(row) for row in rows],
        "swapped_held": [swapped(row) for row in held],
    }
    for name, lines in written.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{name}.jsonl").write_text(text)
    base = {"model": "demo", "data": "demo", "val_data": "demo:heldout", "max_steps": steps,
            "lora_dropout": 0.0, "learning_rate": 1e-3, "micro_batch_size": 8,
            "gradient_accumulation_steps": 1, "cutoff_len": 256, "eval_every": 5}  # fmt: skip
    return {
        "monday": base,
        "tuesday": {**base, "train_on": "all"},
        "wednesday": {**base, "learning_rate": 0.05},
        "thursday": {**base, "data": "few.jsonl", "val_data": "few_held.jsonl"},
        "friday": {**base, "data": "swapped.jsonl", "val_data": "swapped_held.jsonl"},
    }


def swapped(row):
    return {"instruction": row["response"], "response": row["instruction"]}


def train(folder, name, recipe):
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items()))
    words = [sys.executable, "-m", "lorakit", "train", path.name, "--output", f"runs/{name}"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ)
    print(name, done.returncode, done.stderr[-300:], file=sys.stderr)


def pages(given):
    """Notes at the top of each run's page, with a screenshot of what a screen shows first."""
    found = {}
    words = [sys.executable, "-m", "lorakit", "ui", str(given.folder), "--port", "0"]
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server,
        sync_playwright() as playwright,
    ):
        address = server.stdout.readline().split()[1]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(address)
        page.wait_for_url(lambda url: "t=" not in url)
        base = page.url
        for path in sorted((given.folder / "runs").iterdir()):
            page.goto(f"{base}run?name=runs/{path.name}")
            page.wait_for_selector(".u-legend")
            notes = [each.inner_text() for each in page.query_selector_all(".notes li")]
            found[path.name] = {"state": page.inner_text("#state"), "notes": notes}
            if given.screenshots:
                given.screenshots.mkdir(parents=True, exist_ok=True)
                page.screenshot(path=given.screenshots / f"{path.name}.png")
                shot = given.screenshots / f"{path.name}_complete.png"
                page.screenshot(path=shot, full_page=True)
        server.terminate()
    return {"runs": found}


if __name__ == "__main__":
    main()
