"""Interactive chat with streamed answers; in a pipe, one answer per line.

`ChatSession` holds the conversation and runs the commands; `run` connects it to a terminal or a
pipe.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from lorakit.errors import DataError, LorakitError
from lorakit.inference.generate import GenerationSettings, base_answers, stream_reply
from lorakit.model.multi_adapter import MultiAdapterModel
from lorakit.recipe.loader import suggest
from lorakit.redact import visible
from lorakit.storage.run_dir import find_run
from lorakit.types import Message

HELP = """\
/base              answer the last question with the untuned base model
/retry             another answer to the last question
/undo              remove the last question and its answer
/system TEXT       set the system prompt (without TEXT: show it; `/system none` removes it)
/set KEY=VALUE     change a setting (without KEY: show them), such as temperature=0.2
/adapter NAME      switch to another adapter on this base (a run's folder loads one; alone: list)
/save FILE.jsonl   add this conversation to a file that lorakit can train on
/help, /quit       this list; quit (as Ctrl-D). Ctrl-C stops an answer, not the chat.
A line that ends in \\ continues on the next."""
# A context of 100,000 tokens is about 400,000 characters.
LONGEST_LINE = 2**20
COMMANDS = (
    *("/base", "/retry", "/undo", "/system", "/set", "/adapter", "/save"),
    *("/help", "/quit"),
)


class ChatSession:
    """One conversation with a tuned model; `handle` takes a line and yields text to print."""

    def __init__(
        self, several: MultiAdapterModel, system: str | None, settings: GenerationSettings
    ) -> None:
        self.several, self.settings = several, settings
        self.asked_system = system
        self.system = several.tuned[several.active].system if system is None else system
        self.turns: list[Message] = []
        self.ended = False
        self.fault: LorakitError | None = None  # of the last question

    @property
    def model(self) -> Any:
        return self.several.model

    @property
    def tokenizer(self) -> Any:
        return self.several.tuned[self.several.active].tokenizer

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, with the system turn first."""
        head = [Message("system", self.system)] if self.system else []
        return [*head, *self.turns]

    def handle(self, line: str) -> Iterator[str]:
        """Yield pieces of the answer to a question, or the output of a command."""
        # Arguments and pipes of another encoding may contain lone surrogates.
        line = line.strip().encode(errors="replace").decode()
        self.fault = None
        if not line:
            return
        if len(line) > LONGEST_LINE:
            self.fault = DataError(
                f"the line has more than {LONGEST_LINE:,} characters and is ignored"
            )
            yield str(self.fault)
            return
        if not line.startswith("/"):
            self.turns.append(Message("user", line))
            yield from self._answer()
            return
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/q"):
            word = "/quit"
        if word not in COMMANDS:
            yield f"unknown command {word}{suggest(word, COMMANDS)} (/help lists them)"
            return
        yield from getattr(self, f"_{word[1:]}")(rest.strip())

    def _answer(self) -> Iterator[str]:
        """Stream an answer to the last question; a partial answer is kept if it is stopped."""
        pieces: list[str] = []
        try:
            for piece in stream_reply(self.model, self.tokenizer, self.messages, self.settings):
                pieces.append(piece)
                yield piece
        except LorakitError as error:
            self.turns.pop()
            self.fault = error
            yield str(error)
            return
        finally:
            text = "".join(pieces).strip()
            if self.turns and self.turns[-1].role == "user":
                if text:
                    self.turns.append(Message("assistant", text))
                else:
                    self.turns.pop()
        if not text:
            yield "(an empty answer; try /set temperature=0.7 or ask in another way)"

    def _base(self, _: str) -> Iterator[str]:
        question = self._last_question()
        if question is None:
            yield "nothing to ask the base yet"
            return
        try:
            with base_answers(self.model):
                yield from stream_reply(self.model, self.tokenizer, question, self.settings)
        except LorakitError as error:
            self.fault = error
            yield str(error)

    def _last_question(self) -> list[Message] | None:
        positions = [i for i, m in enumerate(self.messages) if m.role == "user"]
        return self.messages[: positions[-1] + 1] if positions else None

    def _retry(self, _: str) -> Iterator[str]:
        if not self.turns:
            yield "nothing to answer again yet"
            return
        if self.turns[-1].role == "assistant":
            self.turns.pop()
        yield from self._answer()

    def _undo(self, _: str) -> Iterator[str]:
        if not self.turns:
            yield "nothing to undo"
            return
        while self.turns and self.turns.pop().role != "user":
            pass
        remaining = sum(m.role == "user" for m in self.turns)
        yield f"removed; {remaining} question{'s' if remaining != 1 else ''} left"

    def _system(self, text: str) -> Iterator[str]:
        if text:
            self.system = None if text == "none" else text
        yield f"system: {self.system or '(none)'}"

    def _set(self, text: str) -> Iterator[str]:
        names = [f.name for f in fields(self.settings)]
        if not text:
            yield ", ".join(f"{n}={getattr(self.settings, n)}" for n in names)
            return
        key, equals, value = (part.strip() for part in text.partition("="))
        if key not in names or not equals:
            yield f"no setting {key}{suggest(key, names)} ({', '.join(names)})"
            return
        fault = _set_fault(key, value)
        if fault:
            yield fault
            return
        parse = float if key in ("temperature", "top_p", "repetition_penalty") else int
        changed: dict[str, Any] = {key: parse(value)}
        self.settings = replace(self.settings, **changed)
        yield f"{key}={getattr(self.settings, key)}"

    def _adapter(self, name: str) -> Iterator[str]:
        several = self.several
        folder = _folder(name) if name and name not in several.tuned else None
        if folder:
            try:
                name = several.add(find_run(folder))
            except LorakitError as error:
                yield str(error)
                return
        if name and name not in several.tuned:
            yield f"no adapter {name}{suggest(name, several.tuned)}; a run's folder loads one"
            return
        if name:
            adapter = several.switch(name)
            self.system = adapter.system if self.asked_system is None else self.system
        yield ", ".join(f"{n} (active)" if n == several.active else n for n in several.tuned)

    def _save(self, name: str) -> Iterator[str]:
        if not name:
            yield "/save needs a file: /save FILE.jsonl"
            return
        if not any(m.role == "assistant" for m in self.turns):
            yield "nothing to save yet"
            return
        path = Path(name)
        if path.suffix != ".jsonl":
            yield f"{path}: expected a name that ends in .jsonl"
            return
        row = {"messages": [m.as_dict() for m in self.messages]}
        try:
            path = path.expanduser()
            with path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
        except (OSError, ValueError, RuntimeError) as error:  # unknown home folder, NUL in the name
            yield f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}"
            return
        yield f"added to {path}; train on it with --data {shlex.quote(str(path))}"

    def _help(self, _: str) -> Iterator[str]:
        yield HELP

    def _quit(self, _: str) -> Iterator[str]:
        self.ended = True
        yield from ()


def run(
    several: MultiAdapterModel,
    *,
    title: str,
    system: str | None,
    settings: GenerationSettings,
    as_json: bool = False,
    question: str | None = None,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
) -> int:
    """Chat in the terminal, answer the lines of a pipe, or answer one `question`.

    Returns:
        0, or the exit code of the last question of a pipe that could not be answered.

    Raises:
        LorakitError: `question` could not be answered.
    """
    stdin, stdout = stdin or sys.stdin, stdout or sys.stdout
    for stream in (stdin, stdout):
        if hasattr(stream, "reconfigure"):
            # Undecodable bytes and characters unknown to the terminal must not end the chat.
            stream.reconfigure(errors="replace")
    session = ChatSession(several, system, settings)
    code = 0
    if question is not None:
        _answer_line(session, question, stdout, as_json, alone=True)
    elif stdin.isatty():
        talk(session, title, stdout)
    else:
        # One line of a pipe is one turn of one conversation.
        for line in _lines(stdin):
            _answer_line(session, line, stdout, as_json)
            code = session.fault.exit_code if session.fault else code
            if session.ended:
                break
    return code


def _lines(stdin: TextIO) -> Iterator[str]:
    """Yield the lines of a pipe, and only the beginning of overlong ones."""
    while line := stdin.readline(LONGEST_LINE + 2):
        rest = line
        while not rest.endswith("\n") and (rest := stdin.readline(LONGEST_LINE + 2)):
            pass
        yield line


def _answer_line(
    session: ChatSession, line: str, stdout: TextIO, as_json: bool, alone: bool = False
) -> None:
    """Print the answer to one line; the fault of a question asked `alone` is raised."""
    if not line.strip():
        return
    pieces = session.handle(line)
    if as_json:
        text = "".join(pieces).strip()
        row = {"question": line.strip(), "error" if session.fault else "answer": text}
        pieces = iter([] if session.ended else [json.dumps(row, ensure_ascii=False)])
    for piece in pieces:
        if alone and session.fault:
            break
        stdout.write(piece)
        stdout.flush()
    if alone and session.fault:
        raise session.fault
    if not session.ended:
        stdout.write("\n")
        stdout.flush()


def talk(session: ChatSession, title: str, stdout: TextIO) -> None:
    """Read a line and print the answer, until /quit or Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history for input())
    stdout.write(f"{title}\n/help lists the commands, Ctrl-D quits\n")
    while not session.ended:
        try:
            line = _read_line(input)
        except (EOFError, KeyboardInterrupt):
            stdout.write("\n")
            return
        answer = session.handle(line)
        with _ctrl_c() as pressed:
            try:
                for piece in answer:
                    stdout.write(visible(piece))  # no control characters to the terminal
                    stdout.flush()
                    if pressed.is_set():
                        break
            except KeyboardInterrupt:
                pressed.set()
            finally:
                answer.close()  # type: ignore[attr-defined]
        if pressed.is_set():
            stdout.write(" [stopped]")
        if line.strip() and not session.ended:
            stdout.write("\n\n")
            stdout.flush()


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; a second one raises KeyboardInterrupt.

    The answer then ends at its next piece. An exception may be raised inside a library's callback
    that swallows it: on a loaded machine an answer continued for a minute.
    """
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _folder(name: str) -> Path | None:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = Path(name).expanduser()
        return path if path.is_dir() else None
    return None


def _read_line(read: Callable[[str], str]) -> str:
    """Read one line, or several joined by trailing backslashes."""
    line = read("> ")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + read(". ")
    return line


_BOUNDS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1e6),
    "temperature": (0, 10),
    "top_p": (0.01, 1),
    "top_k": (0, 1e6),
    "repetition_penalty": (0.1, 10),
    "seed": (0, 2**31),
}


def _set_fault(key: str, value: str) -> str | None:
    low, high = _BOUNDS[key]
    try:
        parsed = float(value)
    except ValueError:
        return f"{key} takes a number (found: {value!r})"
    is_integer = key in ("max_new_tokens", "top_k", "seed")
    if not low <= parsed <= high or (is_integer and (parsed != int(parsed) or not value.isdigit())):
        noun = "a whole number " if is_integer else ""
        return f"{key} is {noun}between {low:g} and {high:g} (found: {value})"
    return None
