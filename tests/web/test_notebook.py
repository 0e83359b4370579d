"""`lorakit.ui()` in Jupyter, in Colab, on a hub, and without a notebook."""

import sys
import types
import urllib.request

import pytest

import lorakit
from lorakit.errors import WorkError
from lorakit.web import notebook

ADDRESS = "http://127.0.0.1:4321/~secret/"


@pytest.fixture
def known_address(monkeypatch):
    monkeypatch.setattr(notebook, "start_server", lambda folder: ADDRESS)


def test_it_starts_a_server_whose_pages_need_no_cookie(folder):
    address = notebook.start_server(folder)
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert "runs/good" in answer.read().decode()
        assert "frame-ancestors *" in answer.headers["Content-Security-Policy"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(WorkError, match="no such folder"):
        notebook.start_server(tmp_path / "nothing")


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
