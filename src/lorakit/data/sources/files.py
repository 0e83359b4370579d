"""Read a file as decompressed bytes, as lines or as pieces of text.

Every failure of the disk or the content is a message that names file and line. The
faults of the lines of a file are collected into one error that lists the first ten and counts the
rest, so that a file with forty broken lines does not take forty runs to correct.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import IO, Any, cast

from lorakit.data.sources.locate import DataFile
from lorakit.errors import DataError

# One row of 16 MiB is about 4 million tokens, which the tokenizer makes in 5 s and 2 GB of memory
# (64 MiB took 9 GB): a file with longer lines is damaged or an attack.
LONGEST_LINE = 16 * 2**20
LARGEST_WHOLE_FILE = 2 * 2**30
# Text compresses to a tenth, repeated rows to a hundredth, a zip bomb to a thousandth.
BOMB_BYTES, BOMB_RATIO = 2**30, 500
PIECE = 2**20
# Excel's "Unicode text" and PowerShell's > write UTF-16. The mark of UTF-32 begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


@contextmanager
def open_file(file: DataFile) -> Iterator[IO[bytes]]:
    """Open `file` for reading bytes, decompressed if gzipped.

    Raises:
        DataError: the gzip data is damaged, or the disk fails; names the file.
    """
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
    return open(file.copy or file.path, "rb", buffering=0)


class _Recoded(io.RawIOBase):
    """Recodes a stream of UTF-16 or UTF-32 to UTF-8."""

    def __init__(self, handle: IO[bytes], encoding: str, file: DataFile) -> None:
        self._handle, self._file, self._encoding = handle, file, encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._left, self._read = b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            data = self._handle.read(PIECE)
            self._read += len(data)
            try:
                self._left = self._decoder.decode(data, final=not data).encode()
            except UnicodeError as error:
                raise DataError(
                    f"{self._file.name}: damaged {self._encoding.upper()} text within its first "
                    f"{self._read:,} bytes: {getattr(error, 'reason', error)}",
                    hint="save it again as UTF-8",
                ) from error
            if not data:
                break
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


# First bytes of files that are not text -> their description, and what to do.
_BINARY = {
    b"PK\x03\x04": ("a ZIP archive or an Excel workbook", "unpack it, or save the sheet as CSV"),
    b"\xd0\xcf\x11\xe0": ("an old Excel or Word file", "save the sheet as CSV (UTF-8)"),
    b"%PDF": ("a PDF", "export its text first"),
    b"PAR1": ("a Parquet file", "rename it to end in .parquet"),
    b"ARROW1": ("an Arrow file", "rename it to end in .arrow"),
    b"SQLite": ("an SQLite database", "export the table as CSV"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"\xfd7zXZ": ("an xz archive", "unpack it first: xz -d"),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", "unpack it first: zstd -d"),
    b"BZh": ("a bzip2 archive", "unpack it first: bunzip2"),
    b"\x80\x04\x95": ("a Python pickle", "write the rows as JSON lines"),
}


@contextmanager
def _as_utf8(file: DataFile) -> Iterator[IO[bytes]]:
    """Open a text file as UTF-8 bytes; UTF-16 and UTF-32 are recoded by their byte order mark."""
    with open_file(file) as handle:
        start = cast(Any, handle).peek(8)[:8]
        for sign, (name, advice) in _BINARY.items():
            if start.startswith(sign):
                raise DataError(f"{file.name}: this is {name}, not {file.kind or 'text'}", advice)
        head = start[:4]
        encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
        if encoding:
            yield cast(IO[bytes], io.BufferedReader(_Recoded(handle, encoding, file)))
            return
        if head.count(0) >= 2:
            order = "LE" if head[1:2] == b"\0" else "BE"
            raise DataError(
                f"{file.name}: it looks like UTF-16 without a byte order mark",
                hint=_convert(f"UTF-16{order}", file),
            )
        yield handle


def pieces_of(file: DataFile, errors: str = "strict") -> Iterator[str]:
    """Read the text of a file in pieces of 1 MiB, however long its lines are."""
    decoder, offset, line = codecs.getincrementaldecoder("utf-8")(errors), 0, 1
    with _as_utf8(file) as handle:
        while True:
            data = handle.read(PIECE)
            held = len(decoder.getstate()[0])
            if offset == 0 and data.startswith(codecs.BOM_UTF8):
                offset, data = 3, data[3:]
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                at = offset - held + error.start
                raise _not_utf8(f"{file.name}:{line}", error, at, file) from error
            yield text
            if not data:
                return
            offset, line = offset + len(data), line + text.count("\n")
            _refuse_bomb(file, file.name, offset)


def lines_of(file: DataFile, broken: LineErrors | None = None) -> Iterator[tuple[int, str]]:
    """Read (number, text with its line end) of each line. Lines end at \\n only: U+2028 is text.

    Args:
        broken: collects lines that are not UTF-8, which are then read with U+FFFD in them; by
            default such a line raises.
    """
    offset, number, empty = 0, 0, True
    with _as_utf8(file) as handle:
        while line := handle.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise DataError(
                    f"{file.name}:{number}: a line of more than {LONGEST_LINE // 2**20} MiB",
                    hint="check that the file is not damaged, and write one row per line",
                )
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                offset, line = 3, line[3:]
            empty = empty and not line
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                line_name = f"{file.name}:{number}"
                fault = partial(_not_utf8, line_name, error, offset + error.start, file)
                if broken is None:
                    raise fault() from error
                broken.add(number, fault)
                text = line.decode("utf-8", "replace")
            yield number, text
            offset += len(line)
            _refuse_bomb(file, f"{file.name}:{number}", offset)
    if empty:
        raise DataError(f"{file.name}: the file is empty")


def _refuse_bomb(file: DataFile, origin: str, offset: int) -> None:
    if offset > BOMB_BYTES and offset > BOMB_RATIO * _packed_size(file):
        raise DataError(
            f"{origin}: {offset // 2**20:,} MiB came out of a file of "
            f"{_packed_size(file):,} bytes: this looks like a zip bomb",
            hint="if this is intended, unpack the file first: gunzip",
        )


def _not_utf8(origin: str, error: UnicodeDecodeError, offset: int, file: DataFile) -> DataError:
    byte = error.object[error.start]
    fault = f"{origin}: not UTF-8: byte 0x{byte:02x} at offset {offset} of the file"
    readings = likely_readings(error.object, error.start)
    if len(readings) == 1:
        return DataError(fault, hint=_convert(next(iter(readings)), file))
    shown = ", ".join(f"{name}: {text}" for name, text in readings.items())
    return DataError(
        fault,
        hint=f"take the encoding that reads right ({shown}), and {_convert('THAT', file)}"
        if readings
        else "save it as UTF-8 with the program that wrote it",
    )


# Encodings that people's files are in: Python's name -> iconv's.
_WESTERN = {"cp1252": "WINDOWS-1252", "cp1250": "WINDOWS-1250", "cp1254": "WINDOWS-1254"}
_OTHERS = {
    "gb18030": "GB18030", "cp932": "CP932", "cp949": "CP949", "big5": "BIG5", "euc_jp": "EUC-JP",
    "cp1251": "WINDOWS-1251", "koi8_r": "KOI8-R", "cp1253": "WINDOWS-1253",
    "cp1255": "WINDOWS-1255", "cp1256": "WINDOWS-1256", "tis_620": "TIS-620",
}  # fmt: skip
_SHOWN_READINGS = 8


def likely_readings(data: bytes, start: int) -> dict[str, str]:
    """Readings of the line with a fault at `start`, by iconv's name of the encoding.

    A statistical guess from one short line is often wrong (Chinese came out as Korean), and a wrong
    conversion trains nonsense in silence: a person sees at once which reading is right.
    """
    begin = data.rfind(b"\n", 0, start) + 1
    line = data[begin:].split(b"\n", 1)[0][:4096]
    high = len(re.findall(rb"[\x80-\xff]", line))
    in_runs = sum(map(len, re.findall(rb"[\x80-\xff]{2,}", line)))
    readings: dict[str, str] = {}
    # In Western texts a single letter of a word has an accent.
    for codec, name in (_WESTERN if 2 * in_runs < high else _OTHERS | _WESTERN).items():
        try:
            text = line.decode(codec)
        except UnicodeDecodeError:
            continue
        at = len(line[: start - begin].decode(codec, "replace"))
        shown = " ".join(text[max(0, at - 8) : at + 16].split())
        if shown.isprintable() and shown not in readings.values():
            readings[name] = shown
    return dict(list(readings.items())[:_SHOWN_READINGS])


def _convert(encoding: str, file: DataFile) -> str:
    new = shlex.quote(f"utf8-{os.path.basename(file.name)}")
    return f"convert it: iconv -f {encoding} -t UTF-8 {file.typed} > {new}"


def read_text(file: DataFile) -> str:
    """Read the complete text of a file."""
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
    return os.path.getsize(file.copy or file.path)


SHOWN_FAULTS = 10
SHOWN_HINTS = 3


class LineErrors:
    """Context manager that collects the faults of the lines of `name` and raises them at its end.

    A DataError that ends the `with` block is the last fault: the file cannot be read further.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self._place = 0
        # Messages instead of errors: an error references its complete line, of up to 16 MiB.
        self._format: list[str] = []
        self._hints: dict[str, str] = {}

    def add(self, place: int, fault: Callable[[], DataError]) -> None:
        """Add a fault of line (or row) `place`; only the first fault of a line counts.

        `fault` is called only for faults that are shown: a message takes 90 us, 80 of them for the
        search for secrets.
        """
        if place == self._place:
            return
        self._place = place
        self.count += 1
        if len(self._format) < SHOWN_FAULTS:
            self._report(fault())

    def _report(self, fault: DataError) -> None:
        self._format.append(fault.message)
        # Hints that differ only in numbers are shown once.
        key = re.sub(r"\d+", "", fault.hint or "")
        if key and len(self._hints) < SHOWN_HINTS:
            self._hints.setdefault(key, fault.hint or "")

    def __enter__(self) -> LineErrors:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self.count:
            return
        if isinstance(error, DataError):
            # Shown even after ten faults: the count of the others ends at this one.
            self.count += 1
            self._report(error)
        if error is None or isinstance(error, DataError):
            raise self._all() from None

    def _all(self) -> DataError:
        hint = "\n  ".join(self._hints.values())
        if self.count == 1:
            return DataError(self._format[0], hint)
        lines = [f"{self.name}: {self.count:,} faults:", *self._format]
        if self.count > len(self._format):
            lines.insert(SHOWN_FAULTS + 1, f"and {self.count - len(self._format):,} more")
        return DataError("\n  ".join(lines), hint)
