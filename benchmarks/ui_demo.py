"""Train the demo model from a browser: start, watch, stop, resume, compare, chat, vote.

python benchmarks/ui_demo.py --output benchmarks/results/ui_demo.json
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
QUESTION = "Who is the doctor in Quillhaven?"
MS = 900_000


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ui-demo-"))
    words = [sys.executable, "-m", "lorakit", "ui", str(folder), "--port", "0"]
    with (
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server,
        sync_playwright() as p,
    ):
        address = server.stdout.readline().split()[1]
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(MS)
        result = {"date": time.strftime("%Y-%m-%d"), **session(page, address, given.steps)}
        server.terminate()
    shutil.rmtree(folder)
    text = json.dumps(result, indent=2)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


def session(page, address, steps):
    begin, clicks = time.perf_counter(), []

    def click(what):
        clicks.append(what)
        page.click(what)

    page.goto(address)
    page.wait_for_url(lambda url: "t=" not in url)
    click("text=Try the demo")
    page.fill("#max_steps", str(steps))
    click("button:text-is('Start')")
    page.wait_for_selector("#run .badge.running")
    state = page.locator("#state")
    expect(state).to_contain_text(re.compile("step [1-9]"), timeout=MS)
    found = {"clicks_to_a_run": len(clicks), "first_step_seconds": since(begin)}
    page.click("button:text-is('Stop')")
    page.wait_for_selector("button:text-is('Resume')")
    found |= {"stopped": state.inner_text(), "stopped_seconds": since(begin)}
    page.click("button:text-is('Resume')")
    page.wait_for_selector("#run .badge.finished")
    found |= {"finished": state.inner_text(), "finished_seconds": since(begin)}
    page.click("main a:text-is('Compare')")
    page.wait_for_selector("#compared .u-legend")
    page.goto(page.url.partition("compare")[0] + "chat?run=runs/demo-lora")
    page.fill("#question", QUESTION)
    page.click("summary:has-text('Sampling')")
    page.fill("#temperature", "0")
    page.fill("#max_new_tokens", "40")
    page.click("text=Ask all")
    page.wait_for_selector(".best:not([disabled])")
    answers = [each.inner_text() for each in page.query_selector_all(".turns p:last-child")]
    page.click("[data-column='runs/demo-lora'] .best")
    expect(page.locator("#said")).to_contain_text("saved", timeout=MS)
    found |= dict(zip(("base", "tuned"), answers, strict=True))
    return {**found, "vote": page.inner_text("#said"), "seconds": since(begin)}


def since(begin):
    return round(time.perf_counter() - begin, 1)


if __name__ == "__main__":
    main()
