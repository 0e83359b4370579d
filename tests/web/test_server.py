"""The server in a process of its own: its address, its token, and that it is light."""

import contextlib
import re
import subprocess
import sys
import types
import urllib.error
import urllib.request

import pytest
from rich.console import Console

import lorakit
from lorakit.errors import WorkError
from lorakit.web import server

LIGHT = """
import sys
import lorakit.web.app
heavy = {"torch", "transformers", "datasets", "pyarrow", "matplotlib"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""


@pytest.fixture
def started(folder):
    """(address with token, process) of `lorakit ui`."""
    words = [sys.executable, "-m", "lorakit", "ui", str(folder), "--port", "0"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        yield process.stdout.readline().split()[1], process
        process.terminate()


def opened(address, cookie=""):
    request = urllib.request.Request(address, headers={"Cookie": cookie})
    with contextlib.suppress(urllib.error.HTTPError):
        return urllib.request.urlopen(request, timeout=30)
    return None


def test_the_printed_address_opens_the_page(started):
    address, process = started
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?t=[\w-]{32}", address)
    assert opened(address.partition("?")[0]) is None
    with opened(address) as answer:
        cookie = answer.headers["Set-Cookie"].partition(";")[0]
    with opened(address.partition("?")[0], cookie) as answer:
        assert "runs/good" in answer.read().decode()
    process.terminate()
    assert process.wait(timeout=20) in (0, -15)


def test_the_server_imports_no_torch():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_taken_port_is_a_sentence_and_the_default_gives_way(monkeypatch):
    listener = server._bound("127.0.0.1", 0)
    taken = listener.getsockname()[1]
    with pytest.raises(WorkError, match="in use"):
        server._bound("127.0.0.1", taken)
    monkeypatch.setattr(server, "PORT", taken)
    other = server._bound("127.0.0.1", None)
    assert other.getsockname()[1] not in (0, taken)
    for each in (listener, other):
        each.close()


def test_other_addresses_are_noted(folder, monkeypatch, capsys):
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: sockets[0].close())
    server.serve_ui(folder, Console(width=200), host="0.0.0.0", port=0, prefix="/p", framed=True)
    text = capsys.readouterr().out
    assert "reachable from other machines" in text
    assert re.search(r"http://0\.0\.0\.0:\d+/p/~[\w-]{32}/", text)


ADDRESS = "http://127.0.0.1:4321/~secret/"


@pytest.fixture
def known_address(monkeypatch):
    monkeypatch.setattr(server, "start_server", lambda folder: ADDRESS)


def test_it_starts_a_server_whose_pages_need_no_cookie(folder):
    address = server.start_server(folder)
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert "runs/good" in answer.read().decode()
        assert "frame-ancestors *" in answer.headers["Content-Security-Policy"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(WorkError, match="no such folder"):
        server.start_server(tmp_path / "nothing")


def test_jupyter_gets_a_frame(known_address, monkeypatch):
    pytest.importorskip("IPython")
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    frame = lorakit.ui(height=500)
    assert (frame.src, frame.height) == (ADDRESS, 500)
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me/")
    assert lorakit.ui().src == "/user/me/proxy/4321/~secret/"


def test_colab_serves_the_port_in_its_own_frame(known_address, monkeypatch):
    pytest.importorskip("IPython")
    served = []
    output = types.SimpleNamespace(
        serve_kernel_port_as_iframe=lambda *a, **k: served.append((a, k))
    )
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(output=output))
    monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace())
    assert lorakit.ui() is None
    assert served == [((4321,), {"path": "/~secret/", "height": "800"})]


def test_elsewhere_the_address_is_printed(known_address, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert lorakit.ui() == ADDRESS
    assert capsys.readouterr().out.strip() == ADDRESS
