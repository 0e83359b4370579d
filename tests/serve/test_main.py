"""What is refused before a server is started, and after, if it serves something else."""

import os
import shutil
import socket
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from lorakit.cli.main import app
from lorakit.errors import RecipeError, RunError, WorkError
from lorakit.export.exporters import export_run
from lorakit.export.tuned_run import open_source
from lorakit.serve.engines import Place, Start
from lorakit.serve.main import Child, Expected, agree, checked_port, read_key, serve
from lorakit.storage.run_dir import RunDir

QUIET = Console(quiet=True)


def test_the_network_is_let_in_with_a_key_only(speaker):
    with pytest.raises(RecipeError, match="lets other machines in"):
        serve([speaker("fruit")], Place("0.0.0.0", 0), "auto", QUIET)
    with pytest.raises(RecipeError, match="--engine tgi: unknown"):
        serve([speaker("fruit")], Place(port=0), "tgi", QUIET)
    with pytest.raises(RecipeError, match="two runs have the same name"):
        serve([speaker("fruit"), speaker("fruit", lora_r=12)], Place(port=0), "auto", QUIET)


def test_a_port_that_is_taken_is_said():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"cannot listen on 127.0.0.1:{port}"):
            checked_port(Place(port=port))
    assert checked_port(Place(port=0)).port > 0
    with pytest.raises(RunError, match="cannot listen on"):
        checked_port(Place(host="192.0.2.1"))
    assert Place("::", 1).url == "http://[::1]:1"


def test_a_run_without_an_adapter_is_one_clear_error(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: demo\n")
    done = CliRunner().invoke(app, ["serve", str(tmp_path), "--offline"])
    assert done.exit_code != 0
    assert isinstance(done.exception, RunError)
    assert done.exception.hint


CARELESS = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"])); self.do_GET()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_that_ends_or_has_no_guard_is_an_error(tmp_path, speaker):
    place, models = checked_port(Place(port=0)), {"fruit": open_source(speaker("fruit"))}

    def child(*words):
        return Child(Start([sys.executable, "-c", *words], [], {}), models, place, tmp_path)

    with (
        pytest.raises(WorkError, match=r"did not start: exit 3, .*\nno such flag$"),
        child("import sys; print('no such flag'); sys.exit(3)") as running,
    ):
        running.wait_ready()
    with (
        pytest.raises(WorkError, match="answers an unknown key with 200, expected 400"),
        child(CARELESS, str(place.port)) as running,
    ):
        running.wait_ready()
    assert running.process.poll() is not None


def test_an_answer_may_differ_where_both_tokens_are_as_likely():
    rows = torch.tensor([[-0.1, -3.0, -9.0], [-1.0, -1.1, -1.2]])
    own = Expected([], [0, 0], rows)
    assert agree(own, [0, 0], 0.3)
    assert agree(own, [0, 1], 0.3)
    assert not agree(own, [1, 0], 0.3)
    assert not agree(own, [], 0.3)


def test_another_model_than_the_trained_one_is_not_served(speaker, tmp_path):
    """The GGUF file of another run, in a run's folder."""
    right, other = RunDir(tmp_path / "fruit"), speaker("animal", lora_r=3)
    shutil.copytree(speaker("fruit").path, right.path, ignore=shutil.ignore_patterns("export"))
    export_run(other, "gguf", right.export / "gguf", QUIET, verify=False)
    with pytest.raises(WorkError, match=r"does not serve what was trained: .*cat dog") as caught:
        serve([right], Place(port=0), "llama.cpp", QUIET)
    assert "apple banana" in str(caught.value)
    (file,) = (right.export / "gguf").glob("*.gguf")
    os.utime(file, (0, 0))
    with pytest.raises(RunError, match="no GGUF file newer than the adapter"):
        serve([right], Place(port=0), "llama.cpp", QUIET)


def test_a_key_comes_from_the_option_or_a_file(tmp_path):
    (tmp_path / "key").write_text("secret\n")
    assert read_key(None, tmp_path / "key") == "secret"
    assert read_key("k", None) == "k"
    assert read_key(None, None) is None
    with pytest.raises(RecipeError, match="both give a key"):
        read_key("k", tmp_path / "key")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_key(None, tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(RecipeError, match="is empty"):
        read_key(None, tmp_path / "empty")
