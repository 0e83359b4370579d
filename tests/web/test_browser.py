"""The page in a real browser: a run started, watched, stopped, compared; each page checked by axe.

`benchmarks/ui_demo.py` does the same with the demo model, resumes and chats.
"""

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
MS = 180_000  # a loaded machine imports torch for a minute
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
        page.set_default_timeout(MS)
        page.goto(address)
        page.wait_for_url(lambda url: "t=" not in url)
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        if path:
            page.goto(address.partition("?")[0] + path)
        return page

    build.expected = []  # parts of messages that a test provokes
    yield build
    for context in contexts:
        context.close()
    assert [m for m in messages if not any(part in m for part in build.expected)] == []


def violations(page):
    page.evaluate(AXE)
    found = page.evaluate("axe.run()")["violations"]
    return [(each["id"], each["nodes"][0]["html"][:200]) for each in found]


@pytest.mark.slow
def test_a_run_is_started_watched_stopped_and_compared(open_page):
    page = open_page()
    page.click("nav >> text=New run")
    for name, value in {"model": "tiny", "data": "colors.jsonl", "learning_rate": "0.02"}.items():
        page.fill(f"#{name}", value)
    page.fill("#more", "dtype: float32\nval_size: 4\noffline: true\n")
    page.fill("#max_steps", "1000000")  # it ends when it is stopped, on a fast machine, too
    page.fill("#name", "mine")
    page.wait_for_selector("#plan .verdict:has-text('Fits')")
    assert "max_steps: 1000000" in page.inner_text("#plan pre")
    page.click("button:text-is('Start')")
    # Watched live: the state changes without a new page.
    page.wait_for_selector("#run .badge.running")
    page.evaluate("window.same = true")
    state = page.locator("#state")
    sync_api.expect(state).to_contain_text(re.compile("step [1-9]"), timeout=MS)
    first = page.inner_text("#state")
    sync_api.expect(state).not_to_have_text(first, timeout=MS)
    page.wait_for_selector(".u-legend")
    assert page.evaluate("window.same")
    sync_api.expect(page.locator("[data-log=train]")).to_contain_text("step", timeout=MS)
    # A second page that starts into the same folder gets a sentence.
    open_page.expected.append("status of 400")
    other = open_page("new?model=tiny&data=colors.jsonl&name=mine")
    other.click("button:text-is('Start')")
    sync_api.expect(other.locator(".fault")).to_contain_text("mine", timeout=MS)
    other.close()
    page.click("button:text-is('Stop')")
    page.wait_for_selector("button:text-is('Resume')")
    page.click("nav >> text=Runs")
    page.check("input[value='runs/mine']")
    page.check("input[value='runs/old']")
    page.click("text=Compare the chosen runs")
    page.wait_for_selector("#compared .u-legend >> text=runs/mine")
    assert "learning_rate" in page.inner_text("main")


def test_answers_stream_side_by_side_and_a_vote_is_kept(open_page, workspace, monkeypatch):
    """The script of the chat; `tests/web/test_model_worker.py` has the models' answers."""
    import threading

    import uvicorn

    from lorakit.web.app import create_app
    from lorakit.web.server import _bound

    app = create_app(workspace, "secret")

    async def stream(do, run, messages, settings, **_):
        for piece in (f"{len(messages)} turns, ", "tuned" if run else "base"):
            yield piece

    async def start():
        pass

    for name, value in (("stream", stream), ("start", start)):
        monkeypatch.setattr(app.app.state.context.chat, name, value)
    listener = _bound("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="error"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    page = open_page()
    page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/?t=secret")
    page.wait_for_url(lambda url: "t=" not in url)
    page.goto(page.url + "chat?run=runs/old")
    for turns in (1, 3):
        page.fill("#question", "What color?")
        page.click("text=Ask all")
        page.wait_for_selector(".best:not([disabled])")
        for name, place in (("base", "base"), ("tuned", "runs/old")):
            answers = page.inner_text(f"[data-column='{place}'] .turns")
            assert answers.endswith(f"{turns} turns, {name}")
    page.click("[data-column='runs/old'] .best")
    sync_api.expect(page.locator("#said")).to_contain_text("saved: 1 rows")
    server.should_exit = True
    thread.join()
    assert "3 turns, tuned" in (workspace / "preferences.jsonl").read_text()


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
