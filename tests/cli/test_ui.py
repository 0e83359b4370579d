"""`lorakit ui`: its options, and a folder that does not exist."""

import pytest
from typer.testing import CliRunner

from lorakit.cli.main import app
from lorakit.errors import RunError
from lorakit.web import server


def test_options_reach_the_server(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(server, "serve_ui", lambda *values: given.append(values))
    words = ["ui", str(tmp_path), "--port", "0", "--allow-host", "hub.org", "--prefix", "/p"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert given[0][0] == tmp_path
    assert given[0][2:] == ("127.0.0.1", 0, ("hub.org",), "/p", False)


def test_there_is_no_share():
    assert CliRunner().invoke(app, ["ui", "--share"]).exit_code == 2


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(RunError, match="no such folder"):
        CliRunner().invoke(app, ["ui", str(tmp_path / "x")], catch_exceptions=False)
