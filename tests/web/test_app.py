"""Every page of runs: what it shows, what it refuses, and no path out of the folder."""

import json
import re

import pytest
from starlette.testclient import TestClient

from lorakit.web import app as web_app
from lorakit.web.app import create_app

TOKEN = "secret-of-this-start"


def test_the_list_shows_all_runs(client):
    text = client.get("/").text
    assert "runs/good" in text
    assert "runs/half" in text
    assert "finished" in text
    part = client.get("/?part=1").text
    assert part.startswith("<div><table")
    assert "<html" not in part


def test_a_folder_without_runs_offers_the_demo(tmp_path):
    with TestClient(create_app(tmp_path, TOKEN), base_url="http://localhost") as client:
        client.get(f"/?t={TOKEN}")
        text = client.get("/").text
    assert "No runs in this folder yet" in text
    assert 'href="new?preset=demo"' in text


def test_a_run_shows_its_parts(client):
    text = client.get("/run?name=runs/good").text
    for words in (
        "What &lt;b&gt;is",
        "a lamp",
        "learning_rate",
        "all 5 tensors",
        "argument",
        "1.5",
    ):
        assert words in text
    assert 'href="file?name=runs/good&amp;file=adapter/adapter_model.safetensors"' in text
    assert "<b>is" not in text


@pytest.mark.parametrize(
    "text", ['{"tuned": 5, "base": [], "samples": {}}', "[]", "{", '{"parts": "x", "faults": 3}']
)
@pytest.mark.parametrize("file", ["eval", "plan", "data_report", "environment", "export/verify"])
def test_a_file_with_odd_contents_costs_its_section_only(client, folder, file, text):
    (folder / "runs" / "good" / f"{file}.json").write_text(text)
    for page in (
        "/",
        "/run?name=runs/good",
        "/compare?name=runs/good",
        "/run-curves?name=runs/good",
    ):
        assert client.get(page).status_code == 200


def test_a_run_whose_process_ended_names_what_to_do(client):
    text = client.get("/run?name=runs/half").text
    assert "Its process has ended after step 12: “Resume” continues" in text
    launcher = client.app.app.state.context.launcher
    log = launcher.own("runs/half", "train", "log")
    log.parent.mkdir()
    log.write_text("error: cannot write x: No space left on device\nhint: free some space\n")
    text = client.get("/run?name=runs/half").text
    assert "cannot write x: No space left on device: free some space." in text


def test_curves_come_with_the_lines_of_the_plan(client):
    found = client.get("/run-curves?name=runs/good").json()
    assert len(found["curves"]["loss"][0]) == 12
    assert found["bounds"]["grad_norm"] == {"name": "clipped above", "value": 1.0}
    assert found["bounds"]["memory_gb"]["value"] == 1.0


def test_live_updates_end_with_the_run(client, monkeypatch):
    """Each state comes once; the last one has no process, and the page loads anew."""
    monkeypatch.setattr(web_app, "SECONDS", 0)
    launcher = client.app.app.state.context.launcher
    processes = iter([5, None, 5, None, None, None])
    monkeypatch.setattr(launcher, "process_of", lambda *_: next(processes))
    monkeypatch.setattr(launcher, "log", lambda name, verb: f"log of {verb}")
    text = client.get("/run-events?name=runs/good").text
    states = [json.loads(line) for line in re.findall(r"data: (.*)\n", text)]
    assert [(state["train"], state["export"]) for state in states] == [
        (True, False),
        (False, False),
    ]
    assert states[0]["logs"] == {"train": "log of train", "export": "log of export"}
    assert states[0]["rows"] == 14  # steps and held-out losses


def test_comparison_shows_what_differs(client):
    text = client.get("/compare?name=runs/good&name=runs/half").text
    assert "0.0003" in text
    assert ">seed<" not in text
    assert 'data-runs="[&#34;runs/good&#34;, &#34;runs/half&#34;]"' in text
    assert "Choose another run" in client.get("/compare?name=runs/good").text


def test_downloads_have_a_name_and_are_named_files_only(client, folder, tmp_path_factory):
    answer = client.get("/file?name=runs/good&file=recipe.yaml")
    assert answer.headers["content-disposition"] == 'attachment; filename="good-recipe.yaml"'
    assert answer.headers["content-type"] == "application/octet-stream"
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("password")
    (folder / "runs" / "good" / "report.html").symlink_to(secret)
    for file in ("../../my.jsonl", "/etc/passwd", "report.html", ".lock", "", "adapter", "a\0"):
        answer = client.get("/file", params={"name": "runs/good", "file": file})
        assert answer.status_code == 400
        assert "no such download" in answer.text


def test_stop_and_resume_answer_in_a_sentence(client):
    for page, words in (("/stop", "is not running"), ("/resume", "is finished")):
        answer = client.post(page, data={"name": "runs/good"})
        assert answer.status_code == 400
        assert words in answer.text
    assert client.get("/stop").status_code == 405
    assert "not a format" in client.post("/export", data={"name": "runs/good", "form": "x"}).text
    assert client.post("/forget", data={"name": "runs/good"}).status_code == 200


def test_an_export_that_failed_is_a_sentence(client, monkeypatch):
    launcher = client.app.app.state.context.launcher
    started = []
    monkeypatch.setattr(launcher, "_launch", lambda *words: started.append(words))
    page = client.post("/export", data={"name": "runs/good", "form": "merged", "quant": ""}).text
    assert started[0][1:] == (
        "export",
        str(launcher.workspace.root / "runs/good"),
        "--to",
        "merged",
    )
    assert "it is compared with the adapter before it is kept" in page
    log = launcher.own("runs/good", "export", "log")
    log.parent.mkdir()
    log.write_text("error: merged: exists already\nhint: remove it\n")
    assert "merged: exists already: remove it." in client.get("/run?name=runs/good").text


def test_models_lists_adapters_and_known_names(client):
    text = client.get("/models").text
    assert 'href="chat?run=runs/good"' in text
    assert "meta-llama/Llama-3.1-8B-Instruct" in text


def test_the_doctor_is_asked_once(client, monkeypatch):
    from lorakit.doctor.checks import Finding

    asked = []
    found = [Finding("torch", "broken", "<b>not found</b>", "pip install torch")]
    monkeypatch.setattr(web_app, "_findings", lambda: asked.append(1) or found)
    for _ in range(2):
        text = client.get("/doctor").text
    assert "1 broken" in text
    assert "&lt;b&gt;not found" in text
    assert len(asked) == 1
    client.post("/doctor")
    assert len(asked) == 2


def test_a_page_that_does_not_exist(client):
    answer = client.get("/nothing/here")
    assert answer.status_code == 404
    assert "does not exist" in answer.text


def test_a_bug_is_a_sentence_without_a_traceback(folder, monkeypatch):
    monkeypatch.setattr(web_app, "run_values", lambda *_: 1 / 0)
    app = create_app(folder, TOKEN)
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        client.get(f"/?t={TOKEN}")
        answer = client.get("/run?name=runs/good")
    assert answer.status_code == 500
    assert "A fault of lorakit (ZeroDivisionError)" in answer.text
    assert "Traceback" not in answer.text


def test_every_page_works_behind_a_prefix(folder):
    """All links are relative, so that a page needs no knowledge of what is in front of it."""
    app = create_app(folder, TOKEN, prefix="/hub/proxy/8765")
    with TestClient(app, base_url="http://localhost") as client:
        client.get(f"/hub/proxy/8765/?t={TOKEN}")
        for page in ("", "run?name=runs/good", "compare", "models", "chat", "data"):
            text = client.get(f"/hub/proxy/8765/{page}").text
            links = re.findall(r'(?:href|src|action)="([^"]*)"', text)
            assert len(links) > 8
            assert not [link for link in links if link.startswith(("/", "http"))]
            assert "style=" not in text
            assert not re.search(r"<script(?! src)|\son\w+=", text)


def test_static_files_stay_in_their_folder(client):
    assert client.get("/static/page.css").status_code == 200
    for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/static/"):
        assert client.get(path).status_code in (404, 405)


def test_fuzzed_requests_find_no_traceback_and_no_way_out(folder, tmp_path_factory):
    from tests.web.fuzz import fuzz

    secret = tmp_path_factory.mktemp("outside") / "secret.txt"
    secret.write_text("the-secret-text")
    found = fuzz(folder, secret, requests=300, seed=1)
    assert found["requests"] == 300
    assert found["faults"] == []
