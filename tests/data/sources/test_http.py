"""Addresses: only public https, s3 and gs; broken downloads, web pages and Drive links are told."""

import gzip
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from lorakit.data.sources import http
from lorakit.data.sources.http import check_scheme, drive_link, open_url
from lorakit.data.sources.locate import locate
from lorakit.data.sources.readers import content_key, read_rows
from lorakit.errors import DataError, DependencyError

ROW = b'{"q": "x", "a": "y"}\n'
ANSWERS = {
    "/rows.jsonl": (200, {"Content-Length": str(len(ROW))}, ROW),
    "/rows.jsonl.gz": (200, {}, gzip.compress(ROW * 3)),
    "/cut.jsonl": (200, {"Content-Length": "5000"}, ROW),
    "/page.jsonl": (200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>sign in</html>"),
    "/named?id=1": (200, {"Content-Disposition": 'attachment; filename="../a.csv"'}, b"q,a\n1,2\n"),
    "/unnamed": (200, {}, ROW),
    "/notes.txt": (200, {}, b"One line.\n"),
    "/rows.json": (200, {}, b"[" + ROW + b"]"),
    "/rows.csv": (200, {}, b"q,a\n1,2\n"),
    "/secret.jsonl": (403, {}, b""),
    "/away.jsonl": (302, {"Location": "http://169.254.169.254/latest/meta-data"}, b""),
    "/away-file.jsonl": (302, {"Location": "file:///etc/passwd"}, b""),
    "/away-https.jsonl": (302, {"Location": "https://10.0.0.1/rows.jsonl"}, b""),
    "/away-name.jsonl": (302, {"Location": "https://localhost/rows.jsonl"}, b""),
    "/away-login.jsonl": (302, {"Location": "https://u:p@example.org/rows.jsonl"}, b""),
    "/moved.jsonl": (302, {"Location": "/rows.jsonl"}, b""),
}


class Handler(BaseHTTPRequestHandler):
    asked: ClassVar = []

    def do_GET(self):
        Handler.asked.append(self.path)
        status, headers, body = ANSWERS.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True).start()
        host = f"127.0.0.1:{made.server_port}"
        monkeypatch.setattr(http, "TEST_HOSTS", frozenset({host}))
        monkeypatch.setenv("no_proxy", "*")
        yield f"http://{host}"
        made.shutdown()


def test_rows_come_from_an_address_also_packed_and_after_a_redirect(server):
    for path, count in (("/rows.jsonl", 1), ("/rows.jsonl.gz", 3), ("/moved.jsonl", 1)):
        rows = list(read_rows(server + path))
        assert [r.values for r in rows] == [{"q": "x", "a": "y"}] * count
        assert str(rows[0].origin) == f"{path[1:]}:1"
    assert content_key(f"{server}/rows.jsonl") is None


def test_the_servers_name_tells_the_kind(server):
    rows = list(read_rows(f"{server}/named?id=1"))
    assert [(r.values, str(r.origin)) for r in rows] == [({"q": "1", "a": "2"}, "a.csv:2")]
    with pytest.raises(DataError, match=r"unknown kind of file"):
        list(read_rows(f"{server}/unnamed"))


@pytest.mark.parametrize("path", ["/notes.txt", "/rows.json", "/rows.csv", "/named?id=1"])
def test_an_address_is_asked_once_and_its_copy_removed(server, path, monkeypatch, tmp_path):
    """Links that expire, or count downloads, and files that change between two requests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    Handler.asked.clear()
    rows = read_rows(server + path)
    assert next(rows).origin.source in (path[1:], "a.csv")
    assert len(list(tmp_path.iterdir())) == 1
    rows.close()
    assert (Handler.asked, list(tmp_path.iterdir())) == ([path], [])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/cut.jsonl", "broke off after 21 of 5,000 bytes"),
        ("/page.jsonl", r"a web page \(HTML\) instead of data"),
        ("/secret.jsonl", r"answers 403 .*private"),
        ("/missing.jsonl", "answers 404"),
        ("/away.jsonl", "addresses of http:// are not read"),
        ("/away-https.jsonl", r"10\.0\.0\.1 is a private address"),
        ("/away-name.jsonl", "is a private address"),
        ("/away-login.jsonl", "holds a login"),
        ("/away-file.jsonl", "addresses of file:// are not read|302"),
    ],
)
def test_what_goes_wrong_is_said(server, path, message):
    with pytest.raises(DataError, match=message):
        list(read_rows(server + path))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "10.0.0.1", "[::1]", "169.254.169.254"])
def test_private_addresses_are_refused_before_a_byte_is_sent(host, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(DataError, match="is a private address"):
        open_url(f"https://{host}/a.jsonl")


@pytest.mark.parametrize(
    "url", ["http://a.org/x.csv", "ftp://a.org/x.csv", "file:///x.csv", "x://y"]
)
def test_other_schemes_are_refused(url):
    with pytest.raises(DataError, match="are not read"):
        locate(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:pw@a.org/x.csv", r"https://\*\*\*@a\.org/x\.csv: holds a login"),
        ("https://a.org/x.csv?token=***", "its key was not written"),
        ("https://[::1/x.csv", "not a valid address"),
    ],
)
def test_addresses_with_a_secret_or_without_sense(url, message):
    with pytest.raises(DataError, match=message) as caught:
        locate(url)
    assert "pw" not in str(caught.value)


def test_buckets_need_their_package(monkeypatch):
    import fsspec

    check_scheme("s3://bucket/a.jsonl")

    def absent(*args, **kwargs):
        raise ImportError("Install s3fs")

    monkeypatch.setattr(fsspec, "open", absent)
    with pytest.raises(DependencyError, match="needs the package s3fs") as caught:
        list(read_rows("s3://bucket/a.jsonl"))
    assert caught.value.hint == "pip install s3fs"


@pytest.mark.parametrize(
    ("link", "expected"),
    [
        ("https://drive.google.com/file/d/1aBcDeFgHiJkL/view?usp=sharing", "id=1aBcDeFgHiJkL&"),
        ("https://drive.google.com/open?id=1aBcDeFgHiJkL", "id=1aBcDeFgHiJkL&"),
        ("https://docs.google.com/spreadsheets/d/1aBcDeFgHiJkL/edit#gid=0", "export?format=csv"),
        ("https://docs.google.com/document/d/1aBcDeFgHiJkL/edit", "export?format=txt"),
        ("https://example.org/file/d/1aBcDeFgHiJkL/view", None),
    ],
)
def test_share_links_of_google_drive_become_downloads(link, expected):
    made = drive_link(link)
    assert made is None if expected is None else expected in made
    if expected:
        assert locate(link)[0].kind == ""


@pytest.mark.parametrize("path", ["drive/folders/1aBcDeFgHiJkL?usp=sharing", "drive/my-drive"])
def test_a_drive_folder_is_refused_with_a_way_out(path):
    with pytest.raises(DataError, match="Google Drive") as caught:
        locate(f"https://drive.google.com/{path}")
    assert caught.value.hint


def test_a_path_into_a_drive_that_is_not_mounted_says_how():
    with pytest.raises(DataError) as caught:
        locate("/content/drive/MyDrive/rows.jsonl")
    assert "drive.mount" in caught.value.hint
