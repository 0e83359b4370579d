"""A file enters; its bytes leave, unpacked, or its lines as text with their numbers.

Whatever the disk, the network or the bytes do is one message that names file and line.
"""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from lorakit.data.locate import DataFile
from lorakit.data.remote import open_url
from lorakit.errors import DataError

# One row of 64 MiB is about 15 million tokens: beyond it, a file is damaged or a trap.
LONGEST_LINE = 64 * 2**20
LARGEST_WHOLE_FILE = 2 * 2**30
# Text packs to a tenth, repeated rows to a hundredth; a bomb to a thousandth.
BOMB_BYTES, BOMB_RATIO = 2**30, 500
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def opened(file: DataFile) -> Iterator[IO[bytes]]:
    """The bytes of `file`, unpacked if gzipped; failures of the disk or network name the file."""
    try:
        with _raw(file) as raw:
            buffered = io.BufferedReader(cast(Any, raw))
            packed = buffered.peek(2)[:2] == b"\x1f\x8b"
            yield cast(IO[bytes], gzip.GzipFile(fileobj=buffered)) if packed else buffered
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{file.name}: the gzip file is damaged: {error}", hint=f"test it: gzip -t {file.name}"
        ) from error
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read: {error.strerror or error}") from error


def _raw(file: DataFile) -> IO[bytes]:
    return open_url(file.path)[0] if file.remote else open(file.path, "rb", buffering=0)


def lines_of(file: DataFile) -> Iterator[tuple[int, str]]:
    """(number, text with its line end) of each line. Lines end at \\n only: U+2028 is text."""
    offset, number, empty = 0, 0, True
    with opened(file) as handle:
        while line := handle.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{file.name}:{number}: a line of more than {LONGEST_LINE // 2**20} MiB",
                    hint="one row belongs on one line; is the file damaged?",
                )
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                offset, line = 3, line[3:]
            empty = empty and not line
            yield number, _decode(line, file, number, offset)
            offset += len(line)
            if offset > BOMB_BYTES and offset > BOMB_RATIO * _packed_size(file):
                raise DataError(
                    f"{file.name}:{number}: {offset // 2**20:,} MiB came out of a file of "
                    f"{_packed_size(file):,} bytes: this looks like a zip bomb",
                    hint="if it is meant so, unpack it: gunzip",
                )
    if empty:
        raise DataError(f"{file.name}: the file is empty")


def _decode(data: bytes, file: DataFile, line: int, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        utf16 = offset == 0 and data.startswith(_UTF16)
        guess = "UTF-16" if utf16 else "WINDOWS-1252"
        raise DataError(
            f"{file.name}:{line}: not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{offset + error.start} of the file" + (" (it looks like UTF-16)" if utf16 else ""),
            hint=f"convert it: iconv -f {guess} -t UTF-8 {file.name} > utf8-{file.name}",
        ) from error


def whole(file: DataFile) -> str:
    """The decoded text of a file that must be read in one piece."""
    pieces, size = [], 0
    for _, line in lines_of(file):
        size += len(line)
        if size > LARGEST_WHOLE_FILE:
            raise DataError(
                f"{file.name}: more than {LARGEST_WHOLE_FILE // 2**30} GiB in one piece",
                hint="split it, or write it as .jsonl, which is read row by row",
            )
        pieces.append(line)
    return "".join(pieces)


def _packed_size(file: DataFile) -> int:
    return BOMB_BYTES if file.remote else os.path.getsize(file.path)
