"""`lorakit serve`: choose a maintained server, start it, check what it serves, stop it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakit.errors import DependencyError, RecipeError, RunError, WorkError
from lorakit.export.tuned_run import TunedRun, checked_prompts, open_source
from lorakit.serve import engines
from lorakit.serve.engines import Place
from lorakit.serve.guard import CHAT, ENV, HEALTH, LOOPBACK
from lorakit.storage.run_dir import RunDir

LOADING_SECONDS = 1800
STOPPING_SECONDS = 10
PROMPTS, TOKENS = 3, 16
# Nats by which the served token may be less likely than the run's own first choice: rounding to 16
# bits is 0.1 at most, 4-bit quantizations 0.5.
TOLERANCE, TOLERANCE_QUANTIZED = 0.3, 1.0

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # by no proxy


@dataclass(frozen=True, slots=True)
class Expected:
    """A conversation, lorakit's own greedy answer, and its log-probabilities [N, V] along it."""

    messages: list[dict[str, str]]
    answer: list[int]
    predictions: Any


def serve(runs: Sequence[RunDir], place: Place, engine: str, console: Console) -> None:
    """Serve these runs until Ctrl-C; each is a model by its folder's name.

    Raises:
        RecipeError: unknown engine, two runs of one name, or an open network without a key.
        RunError: the port is taken.
        DependencyError: no server is installed.
        ModelError: a run's base is gone or changed.
        WorkError: the server did not start, ended, or does not answer as the run does.
    """
    if place.host not in LOOPBACK and not place.api_key:
        raise RecipeError(
            f"--host {place.host} lets other machines in, and there is no key",
            hint="give one with --api-key-file FILE, or stay on 127.0.0.1",
        )
    if not hasattr(os, "killpg"):
        raise DependencyError(
            "serve ends the engine's processes by signals that Windows does not have",
            hint="run it in WSL 2, or export the model and start an engine of your own",
        )
    place = checked_port(place)
    # transformers reads what follows "@" as a revision.
    models = {s.name.replace("@", "-"): s for s in map(open_source, runs)}
    if len(models) < len(runs):
        raise RecipeError("two runs have the same name", hint="rename one of the folders")
    with tempfile.TemporaryDirectory(prefix="lorakit-serve-") as folder:
        chosen, start = engines.choose_engine(models, engine, place, Path(folder), console)
        # Before a server takes the memory.
        expected = {name: expectation(source) for name, source in models.items()}
        with Child(start, models, place, Path(folder)) as child:
            child.wait_ready()
            for name, wanted in expected.items():
                child.compare(name, wanted)
            shown = ", ".join(f"{name} = {source.run.path}" for name, source in models.items())
            console.print(f"models   {shown}")
            for name, keys in start.keys.items():
                of = "" if len(models) == 1 else f"of {name}: "
                console.print(f"keys     {of}{', '.join(keys)}; others are refused")
            console.print(f"serving  {place.url}/v1 by {chosen} (Ctrl-C stops)")
            child.wait()
    console.print("stopped")


def checked_port(place: Place) -> Place:
    """Address with a free port; port 0 becomes any free one.

    Raises:
        RunError: it is taken, or the host is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((place.host, place.port))
        except (OSError, OverflowError) as error:
            raise RunError(
                f"--port {place.port}: cannot listen on {place.host}:{place.port}: "
                f"{getattr(error, 'strerror', None) or error}",
                hint="another program has it; choose one with --port, or 0 for any free one",
            ) from error
        return Place(place.host, probe.getsockname()[1], place.api_key)


def read_key(api_key: str | None, file: Path | None) -> str | None:
    """Read the key; a file keeps it out of the shell's history and of `ps`.

    Raises:
        RecipeError: the file cannot be read or is empty, or both were given.
    """
    if file is None:
        return api_key
    if api_key is not None:
        raise RecipeError("--api-key and --api-key-file both give a key", hint="keep one")
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--api-key-file {file}: cannot be read: {error}") from error
    if not key:
        raise RecipeError(f"--api-key-file {file}: is empty", hint="put the key into it")
    return key


def expectation(source: TunedRun) -> list[Expected]:
    """lorakit's own greedy answers to held-out prompts."""
    import torch

    from lorakit.data.tokenize.encode import prompt_ids
    from lorakit.export.verify_outputs import greedy, predictions
    from lorakit.model.load import load_run
    from lorakit.types import Message

    model, found = load_run(source.run).model.eval(), []
    for conversation in checked_prompts(source, PROMPTS):
        turns = [Message(m.role, m.content) for m in conversation.messages[:-1]]
        if source.recipe.system and all(m.role != "system" for m in turns):
            turns = [Message("system", source.recipe.system), *turns]
        prompt = prompt_ids(source.tokenizer, turns)
        (answer,) = greedy(model, [prompt], TOKENS, frozenset(source.stops()))
        messages = [{"role": m.role, "content": m.content} for m in turns]
        found.append(Expected(messages, answer, predictions(model, prompt, answer)))
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


class Child:
    """The server's process, ended with the block or by Ctrl-C."""

    def __init__(
        self, start: engines.Start, models: engines.Models, place: Place, folder: Path
    ) -> None:
        self.start, self.models, self.place = start, models, place
        self.log = folder / "server.log"
        systems = {name: source.recipe.system for name, source in models.items()}
        settings: dict[str, Any] = {
            "models": systems,
            "keys": start.keys,
            "defaults": start.defaults,
        }
        settings |= {"api_key": place.api_key, "loopback": place.host in LOOPBACK}
        # llama.cpp's threads wait for each other: spinning took 6 times as long on a busy machine.
        env = {"OMP_WAIT_POLICY": "passive", **os.environ, "HF_HUB_OFFLINE": "1"}
        env |= {"VLLM_API_KEY": place.api_key} if place.api_key else {}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                start.command,
                cwd=folder,
                env={**env, ENV: json.dumps(settings)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches lorakit alone, which ends all of it
            )

    def __enter__(self) -> Child:
        # SIGINT too: a shell's background job ignores it.
        signs, stop = (signal.SIGINT, signal.SIGTERM), signal.default_int_handler
        self.handlers = {sign: signal.signal(sign, stop) for sign in signs}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, sign)
                self.process.wait(STOPPING_SECONDS)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        return kind is KeyboardInterrupt

    def wait_ready(self) -> None:
        """Wait until it answers, and check that the guard is in front of it.

        Raises:
            WorkError: it ended, or took too long, or answers what the guard refuses.
        """
        end = time.monotonic() + LOADING_SECONDS
        while self.ask(HEALTH)[0] != 200:
            if self.process.poll() is not None or time.monotonic() > end:
                raise WorkError(f"the server did not start: {self._tail()}")
            time.sleep(0.2)
        name = next(iter(self.models))
        turns = [{"role": "user", "content": "Hi"}]
        body = {"model": name, "messages": turns, "max_tokens": 1, "no_such_key": 1}
        status, _ = self.ask(CHAT, body)
        if status != 400:
            raise WorkError(
                f"the server answers an unknown key with {status}, expected 400: lorakit's guard "
                "is not in front of it",
                hint="please report this with the version of the server",
            )

    def wait(self) -> None:
        """Wait until it ends.

        Raises:
            WorkError: it did.
        """
        self.process.wait()
        raise WorkError(f"the server ended by itself: {self._tail()}")

    def ask(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Return (status, body) of one request; status 0 without an answer."""
        headers = {"Authorization": f"Bearer {self.place.api_key}"}
        headers |= {"Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.place.url + path, data, headers)
        try:
            with OPENER.open(request, timeout=LOADING_SECONDS) as reply:
                return reply.status, json.load(reply) if body else None
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except OSError:
            return 0, None

    def compare(self, name: str, expected: Sequence[Expected]) -> None:
        """Check that it answers as the run does, up to the first difference that rounding explains.

        Raises:
            WorkError: it answers something else.
        """
        limit = TOLERANCE if self.start.exact else TOLERANCE_QUANTIZED
        source, stops = self.models[name], self.models[name].stops()
        for own in expected:
            body = {"model": name, "messages": own.messages, "temperature": 0, "max_tokens": TOKENS}
            status, reply = self.ask(CHAT, body)
            if status != 200:
                raise WorkError(f"{name}: the server answers {status}: {reply or self._tail()}")
            message, end = reply["choices"][0]["message"], reply["choices"][0]["finish_reason"]
            text, trained = message["content"] or "", source.tokenizer.decode(own.answer)
            plain = source.tokenizer.decode(own.answer, skip_special_tokens=True)
            # Calls and thoughts come in fields of their own, without what marked them.
            parts = [call["function"]["name"] for call in message.get("tool_calls") or ()]
            parts += [message["reasoning_content"]] if message.get("reasoning_content") else []
            if parts:
                same = all(part.strip()[:20] in trained for part in parts)
            else:
                ids = source.tokenizer(text, add_special_tokens=False)["input_ids"]
                if end == "stop":
                    ids.append(next((i for i in own.answer if i in stops), stops[0]))
                same = text.strip() == plain.strip() or agree(own, ids, limit)
            if not same:
                raise WorkError(
                    f"{name}: the server does not serve what was trained: it answers "
                    f"{(text or str(parts))[:80]!r}, the run {trained[:80]!r}",
                    hint="try another --engine, and please report this model",
                )

    def _tail(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"exit {self.process.poll()}, last lines of its log:\n" + "\n".join(lines[-8:])


def agree(own: Expected, ids: Sequence[int], limit: float) -> bool:
    """Return True if `ids` are the run's answer, or differ first where both are as likely."""
    for a, b, row in zip(own.answer, ids, own.predictions, strict=False):
        if a != b:
            return bool(row[a] - row[b] <= limit)
    return len(ids) > 0
