"""The server's side of a `model_worker`: start it when needed, ask it, survive its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, WorkError

LINE_BYTES = 2**26  # of one answer: a page of long examples


class WorkerClient:
    """One child process, started at the first request and again after it ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._waiting: dict[int, asyncio.Queue[dict[str, Any]]] = {}
        self._numbers = itertools.count(1)
        self._starting = asyncio.Lock()

    async def ask(self, do: str, **values: Any) -> Any:
        """Result of one request.

        Raises:
            LorakitError: the worker refused it, or ended.
        """
        result = None
        async for message in self._exchange(do, values):
            result = message.get("result")
        return result

    async def stream(self, do: str, **values: Any) -> AsyncIterator[str]:
        """Pieces of an answer; ending the loop ends the work on it.

        Raises:
            LorakitError: the worker refused it, or ended.
        """
        messages = self._exchange(do, values)
        try:
            async for message in messages:
                if "piece" in message:
                    yield message["piece"]
        finally:
            await messages.aclose()

    async def start(self) -> None:
        """Start the process if it does not run, so that its imports are done when it is asked."""
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-m",
                    "lorakit.web.model_worker",
                    cwd=self.folder,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=LINE_BYTES,
                )
                self._reader = asyncio.create_task(self._read(self._process))

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _exchange(self, do: str, values: dict[str, Any]) -> Any:
        await self.start()
        process, number = self._process, next(self._numbers)
        assert process
        messages = self._waiting[number] = asyncio.Queue()
        done = False
        try:
            await self._send(process, {"id": number, "do": do, **values})
            while not done:
                message = await messages.get()
                if "error" in message:
                    done = True
                    raise WorkError(message["error"], message.get("hint"))
                done = "result" in message
                yield message
        finally:
            self._waiting.pop(number, None)
            if not done:
                with contextlib.suppress(LorakitError):
                    await self._send(process, {"cancel": number})

    async def _send(self, process: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write((json.dumps(message) + "\n").encode())
            await process.stdin.drain()
        except (ConnectionError, BrokenPipeError) as error:
            raise _ended(process.returncode) from error

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        """Hand each line to the request that waits for it; at the end, an error to all."""
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # a line that is too long
            while line := await process.stdout.readline():
                message = json.loads(line)
                if found := self._waiting.get(message["id"]):
                    found.put_nowait(message)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        fault = _ended(await process.wait())
        for waiting in self._waiting.values():
            waiting.put_nowait({"error": fault.message, "hint": fault.hint})


def _ended(code: int | None) -> WorkError:
    return WorkError(
        f"the process with the model ended (exit code {code})",
        hint="ask again; if it was out of memory, close other programs or use a smaller model",
    )
