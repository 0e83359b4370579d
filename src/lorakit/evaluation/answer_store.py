"""Keep the answers of one model to one task in a file, so that a second evaluation continues.

The key of an answer is a hash of what was asked, in token ids, with the settings of generation. The
file's folder is named by the model: its weights, type and device.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.redact import redacted
from lorakit.storage.atomic_dir import write_error


class AnswerStore:
    """Answers by key, appended to a file batch by batch.

    Args:
        path: the file; None keeps the answers in memory alone.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    row = json.loads(line)
                    self.answers[row["key"]] = row["answer"]
                except (ValueError, KeyError, TypeError):
                    continue  # a torn last line

    def add(self, keys: Sequence[str], answers: Sequence[Any]) -> None:
        """Keep answers, on the disk at once.

        Raises:
            WorkError: the disk is full or the folder cannot be written.
        """
        self.answers |= dict(zip(keys, answers, strict=True))
        if self.path is None:
            return
        rows = [{"key": k, "answer": a} for k, a in zip(keys, answers, strict=True)]
        text = "".join(redacted(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as handle:
                if handle.tell() and not _ends_with_newline(self.path):
                    text = "\n" + text
                handle.write(text.encode(errors="replace"))
        except OSError as error:
            raise write_error(self.path, error, len(text)) from error


def request_keys(kind: str, requests: Sequence[Any], settings: Any = None) -> list[str]:
    """Key of each request; equal requests are numbered, since sampled answers differ."""
    seen: Counter[str] = Counter()
    keys = []
    for request in requests:
        text = json.dumps([kind, request, settings], sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]
        keys.append(f"{digest}-{seen[digest]}" if seen[digest] else digest)
        seen[digest] += 1
    return keys


def file_name(task: str) -> str:
    """Name of a task's file: the task in letters, digits and dashes, with a hash if changed."""
    plain = re.sub(r"[^\w.-]+", "-", task)[:80].strip(".-") or "task"
    changed = "" if plain == task else "-" + hashlib.sha256(task.encode()).hexdigest()[:8]
    return f"{plain}{changed}.jsonl"


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(-1, 2)
        return handle.read(1) == b"\n"
