"""Stream the bytes behind an address, from public hosts only.

https is read with the standard library: fsspec's reader requires aiohttp and cannot check the
target of a redirect. Recipes are passed on, so an address must not reach into the reader's own
network: each host, also of a redirect, is looked up once, and a private address is refused before a
byte is sent. s3:// and gs:// are read with fsspec, with the keys of the user's environment.
"""

from __future__ import annotations

import email.message
import http.client
import io
import ipaddress
import re
import socket
import urllib.error
import urllib.request
from typing import IO, Any, cast
from urllib.parse import parse_qs, urlsplit

from lorakit.errors import DataError, DependencyError
from lorakit.redact import HIDDEN, has_login

SCHEMES = ("https", "s3", "gs")
PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
# Hosts of test servers: only these may be private and use plain http.
TEST_HOSTS: frozenset[str] = frozenset()
TIMEOUT_S = 30
_DRIVE_FILE = re.compile(r"/(?:file|document|spreadsheets|presentation)/d/([\w-]{10,})")


def check_scheme(url: str) -> None:
    """Refuse an address that cannot be read.

    Raises:
        DataError: the scheme is not https, s3 or gs, or the address holds a login.
    """
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DataError(f"{url}: not a valid address: {error}") from error
    if has_login(url):
        raise DataError(
            f"{url}: holds a login, which would be passed on with the recipe",
            hint="download it first; for s3:// and gs:// the keys come from the environment",
        )
    if HIDDEN in url:
        raise DataError(
            f"{url}: its key was not written into the recipe of the run",
            hint="give the complete address again, with --data",
        )
    if parts.scheme in SCHEMES or (parts.scheme == "http" and parts.netloc in TEST_HOSTS):
        return
    hints = {
        "file": "give the path itself, without file://",
        "http": "use https://: data over http may have been changed in transit",
        "hf": "give the data set's id, user/name",
    }
    raise DataError(
        f"{url}: addresses of {parts.scheme}:// are not read",
        hint=hints.get(parts.scheme, f"known: {', '.join(s + '://' for s in SCHEMES)}; or download "
        "it first"),
    )  # fmt: skip


def drive_link(url: str) -> str | None:
    """Return the download address of a share link of Google Drive, or None for other addresses.

    Raises:
        DataError: the link is to a folder, which has no download, or has no file id.
    """
    parts = urlsplit(url)
    if parts.hostname not in ("drive.google.com", "docs.google.com"):
        return None
    if "/folders/" in parts.path:
        raise DataError(
            f"{url}: a shared folder of Google Drive cannot be listed without an account",
            hint="in Colab, mount the drive and give its path (/content/drive/MyDrive/...); "
            "elsewhere, share each file and list their links",
        )
    match = _DRIVE_FILE.search(parts.path)
    file_id = match.group(1) if match else parse_qs(parts.query).get("id", [""])[0]
    if not file_id:
        raise DataError(f"{url}: no file id in this Google Drive link", hint="copy the share link")
    if "/spreadsheets/" in parts.path:
        return f"https://docs.google.com/spreadsheets/d/{file_id}/export?format=csv"
    if "/document/" in parts.path:
        return f"https://docs.google.com/document/d/{file_id}/export?format=txt"
    # `confirm=t` skips the page that warns of a file too large to be scanned for viruses.
    return f"https://drive.usercontent.google.com/download?id={file_id}&export=download&confirm=t"


def open_url(url: str) -> tuple[IO[bytes], str]:
    """Open `url` for streaming.

    Returns:
        The stream of bytes, and the file name that the server gives ("" if it gives none).

    Raises:
        DataError: the address is refused, cannot be fetched, or is a web page instead of data.
        DependencyError: the package for this scheme is missing.
    """
    check_scheme(url)
    scheme = urlsplit(url).scheme
    if scheme in PACKAGES:
        return _open_bucket(url, scheme), ""
    try:
        answer = _opener().open(drive_link(url) or url, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        private = " (it may be private)" if error.code in (401, 403) else ""
        raise DataError(
            f"{url}: the server answers {error.code} {error.reason}{private}"
        ) from error
    except urllib.error.URLError as error:
        raise DataError(f"{url}: cannot be reached: {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DataError(f"{url}: cannot be fetched: {error}") from error
    headers = answer.headers
    if headers.get_content_type() == "text/html":
        answer.close()
        raise _web_page(url)
    size = headers.get("Content-Length")
    stream = _Counted(answer, url, int(size) if size and size.isdigit() else None)
    return cast(IO[bytes], stream), _filename(headers)


class _Counted(io.RawIOBase):
    """A download that raises on a broken connection instead of ending early."""

    def __init__(self, answer: Any, url: str, size: int | None) -> None:
        self._answer, self._url, self._size, self._read = answer, url, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._answer.read(len(buffer))
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{self._url}: the download broke off: {error}") from error
        if not data and self._size is not None and self._read < self._size:
            raise DataError(
                f"{self._url}: the download broke off after {self._read:,} of {self._size:,} bytes",
                hint="start again, or download a large file first",
            )
        buffer[: len(data)] = data
        self._read += len(data)
        return len(data)

    def close(self) -> None:
        self._answer.close()
        super().close()


def _open_bucket(url: str, scheme: str) -> IO[bytes]:
    import fsspec  # type: ignore[import-untyped]

    try:
        return cast(IO[bytes], fsspec.open(url, "rb").open())
    except ImportError as error:
        package = PACKAGES[scheme]
        raise DependencyError(
            f"{url}: {scheme}:// needs the package {package}", hint=f"pip install {package}"
        ) from error
    # Cloud clients raise their own types for access, names and networks.
    except Exception as error:
        raise DataError(f"{url}: cannot be read: {error}") from error


def _web_page(url: str) -> DataError:
    host = urlsplit(url).hostname or ""
    if host.endswith("google.com"):
        hint = "share it as 'Anyone with the link', or mount the drive and give the file's path"
    elif host == "github.com":
        hint = "take the address behind the button 'Raw'"
    else:
        hint = "open it in a browser: a sign-in page, or a page about the file, is not the file"
    return DataError(f"{url}: the server sent a web page (HTML) instead of data", hint=hint)


def _filename(headers: email.message.Message) -> str:
    name = headers.get_filename() or ""
    # Only the suffix is used, but the name must not be a path.
    return name.replace("\\", "/").rsplit("/", 1)[-1]


# -- connections to public addresses only ---------------------------------------------------------


def _connect(address: tuple[str, int], timeout: Any = None, *_: Any) -> socket.socket:
    """Connect to the address that was checked, since a second look-up could return another."""
    host, port = address
    error: OSError = OSError(f"no address for {host}")
    for family, socket_type, protocol, _name, sockaddr in socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        ip = ipaddress.ip_address(sockaddr[0])
        if not ip.is_global and f"{host}:{port}" not in TEST_HOSTS:
            raise DataError(
                f"{host}: {ip} is a private address; data is only fetched from public ones",
                hint="download the file first, and give its path",
            )
        try:
            opened = socket.socket(family, socket_type, protocol)
            opened.settimeout(timeout if isinstance(timeout, int | float) else TIMEOUT_S)
            opened.connect(sockaddr)
            return opened
        except OSError as failed:
            error = failed
    raise error


class _PublicHTTPS(http.client.HTTPSConnection):
    def connect(self) -> None:
        if not self._tunnel_host:  # type: ignore[attr-defined]  # a proxy checks for itself
            self._create_connection = _connect
        super().connect()


class _PublicHTTP(http.client.HTTPConnection):
    def connect(self) -> None:
        self._create_connection = _connect
        super().connect()


class _HTTPS(urllib.request.HTTPSHandler):
    def https_open(self, req: Any) -> Any:
        return self.do_open(_PublicHTTPS, req)


class _HTTP(urllib.request.HTTPHandler):
    def http_open(self, req: Any) -> Any:
        return self.do_open(_PublicHTTP, req)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str):  # type: ignore[no-untyped-def]
        check_scheme(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    opener = urllib.request.build_opener(_HTTPS, _HTTP, _Redirects)
    opener.addheaders = [("User-Agent", "lorakit")]
    return opener
