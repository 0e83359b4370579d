"""The page in a real browser: a run started, watched, stopped, resumed, compared, chatted with."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python", reason="axe-playwright-python is not installed")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
if not CHROMIUM:
    pytest.skip("no Chromium on this machine", allow_module_level=True)
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
AXE = Path(axe.__file__).with_name("axe.min.js").read_text("utf-8")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def workspace(tiny_model_dir, tiny_data, tmp_path_factory):
    from tests.web.conftest import write_run

    folder = tmp_path_factory.mktemp("workspace")
    shutil.copytree(tiny_model_dir, folder / "tiny")
    shutil.copy(tiny_data, folder / "colors.jsonl")
    write_run(folder / "runs" / "old", steps=3000)
    return folder


@pytest.fixture(scope="module")
def address(workspace):
    words = [sys.executable, "-m", "lorakit", "ui", str(workspace), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split()[1]
        process.terminate()


@pytest.fixture
def open_page(browser, address):
    """`open_page(path, **options)`: a page with the cookie; any message of the console fails it."""
    contexts, messages = [], []

    def build(path="", **options):
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.goto(address)
        page.wait_for_url(lambda url: "t=" not in url)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        if path:
            page.goto(address.partition("?")[0] + path)
        return page

    yield build
    for context in contexts:
        context.close()
    assert not messages


def violations(page):
    page.evaluate(AXE)
    found = page.evaluate("axe.run()")["violations"]
    return [(each["id"], each["nodes"][0]["html"][:200]) for each in found]


@pytest.mark.slow
def test_a_run_from_its_start_to_a_chat_in_a_browser(open_page, workspace):
    page = open_page()
    page.click("nav >> text=New run")
    for name, value in {"model": "tiny", "data": "colors.jsonl", "learning_rate": "0.02"}.items():
        page.fill(f"#{name}", value)
    page.fill("#more", "dtype: float32\nval_size: 4\noffline: true\n")
    page.fill("#max_steps", "3000")
    page.fill("#name", "mine")
    page.wait_for_selector("#plan .verdict:has-text('Fits')")
    assert "max_steps: 3000" in page.inner_text("#plan pre")
    page.click("button:text-is('Start')")
    # Watched live: the state changes without a new page.
    page.wait_for_selector("#run .badge.running")
    page.evaluate("window.same = true")
    state = page.locator("#state")
    sync_api.expect(state).to_contain_text(re.compile("step [1-9]"), timeout=60_000)
    first = page.inner_text("#state")
    sync_api.expect(state).not_to_have_text(first, timeout=60_000)
    page.wait_for_selector(".u-legend")
    assert page.evaluate("window.same")
    assert "step" in page.inner_text("#log")
    # A second page that starts into the same folder gets a sentence.
    other = open_page("new?model=tiny&data=colors.jsonl&name=mine")
    other.click("button:text-is('Start')")
    assert "mine" in other.inner_text(".fault")
    other.close()
    page.click("button:text-is('Stop')")
    assert "saved first" in page.inner_text(".note")
    page.wait_for_selector("button:text-is('Resume')")
    stopped_at = int(page.inner_text("#state").split("step ")[1].split()[0].replace(",", ""))
    # Resumed with fewer steps to go: the recipe is the run's own.
    recipe = workspace / "runs" / "mine" / "recipe.yaml"
    text = recipe.read_text().replace("max_steps: 3000", f"max_steps: {stopped_at + 5}")
    recipe.write_text(text)
    page.click("button:text-is('Resume')")
    page.wait_for_selector("#run .badge.finished", timeout=90_000)
    assert f"step {stopped_at + 5:,}" in page.inner_text("#state")
    page.click("nav >> text=Runs")
    page.check("input[value='runs/mine']")
    page.check("input[value='runs/old']")
    page.click("text=Compare the chosen runs")
    page.wait_for_selector("#compared .u-legend >> text=runs/mine")
    assert "max_steps" in page.inner_text("main")
    page.goto(page.url.partition("compare")[0] + "chat?run=runs/mine")
    page.fill("#question", "What color is box 1?")
    page.click("summary:has-text('Sampling')")
    page.fill("#max_new_tokens", "8")
    page.click("text=Ask all")
    page.wait_for_selector(".best:not([disabled])", timeout=90_000)
    base, tuned = (each.inner_text() for each in page.query_selector_all(".turns"))
    assert base != tuned
    page.click("section[data-column='runs/mine'] .best")
    sync_api.expect(page.locator("#said")).to_contain_text("saved")
    assert (workspace / "preferences.jsonl").read_text().count("\n") == 1


PAGES = [
    "",
    "run?name=runs/old",
    "compare?name=runs/old",
    "new",
    "chat?run=runs/old",
    "models",
    "data",
]


@pytest.mark.parametrize(
    ("size", "scheme"), [(PHONE, "dark"), (DESKTOP, "light")], ids=["phone", "desktop"]
)
def test_pages_are_accessible_and_fit(open_page, size, scheme):
    page = open_page(viewport=size, color_scheme=scheme)
    base = page.url
    for path in PAGES:
        page.goto(base + path)
        if path[:3] in ("run", "com"):
            page.wait_for_selector(".u-legend")
        assert violations(page) == [], path
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], path


def test_the_keyboard_reaches_the_content_and_every_page(open_page):
    page = open_page()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page = open_page()
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:text-is('New run')")


def test_without_a_script_the_numbers_are_there(open_page):
    page = open_page("run?name=runs/old", java_script_enabled=False)
    page.click("summary:has-text('Curves as a table')")
    assert page.is_visible("td:text-is('3,000')")


def test_the_cookie_is_strict_and_hidden_from_scripts(open_page):
    page = open_page()
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.evaluate("document.cookie") == ""
