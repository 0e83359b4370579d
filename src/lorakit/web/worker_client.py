"""The server's side of a `model_worker`: start it when needed, ask it, survive its end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, WorkError

Message = dict[str, Any]
LINE_BYTES = 2**26  # of one answer: a page of long examples


class WorkerClient:
    """One child process, started at the first request and again after it ended.

    It answers one request at a time; what is left of an answer that nobody reads is skipped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._numbers = itertools.count(1)
        self._starting, self._turn = asyncio.Lock(), asyncio.Lock()

    async def ask(self, do: str, **values: Any) -> Any:
        """Result of one request.

        Raises:
            LorakitError: the worker refused it, or ended.
        """
        async for message in self._messages(do, values):
            if "result" in message:
                result = message["result"]
        return result

    async def stream(self, do: str, **values: Any) -> AsyncIterator[str]:
        """Pieces of an answer; ending the loop ends the work on it.

        Raises:
            LorakitError: the worker refused it, or ended.
        """
        messages = self._messages(do, values)
        try:
            async for message in messages:
                if "piece" in message:
                    yield message["piece"]
        finally:
            await messages.aclose()

    async def start(self) -> asyncio.subprocess.Process:
        """Start the process if it does not run, so that its imports are done when it is asked."""
        async with self._starting:
            if self._process is None or self._process.returncode is not None:
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "lorakit.web.model_worker"),
                    cwd=self.folder,
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    limit=LINE_BYTES,
                )
            return self._process

    async def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _messages(self, do: str, values: Message) -> AsyncGenerator[Message, None]:
        """Messages of one request, the last of which has its result."""
        number, done = next(self._numbers), False
        async with self._turn:
            process = await self.start()
            try:
                await self._send(process, {"id": number, "do": do, **values})
                while not done:
                    message = await self._read(process)
                    if message["id"] != number:
                        continue
                    done = "result" in message or "error" in message
                    if "error" in message:
                        raise WorkError(message["error"], message.get("hint"))
                    yield message
            finally:
                if not done:
                    with contextlib.suppress(LorakitError):
                        await self._send(process, {"cancel": number})

    async def _send(self, process: asyncio.subprocess.Process, message: Message) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write((json.dumps(message) + "\n").encode())
            await process.stdin.drain()
        except ConnectionError as error:
            raise _ended(process.returncode) from error

    async def _read(self, process: asyncio.subprocess.Process) -> Message:
        assert process.stdout is not None
        line = b""
        with contextlib.suppress(ValueError):  # a line that is too long
            line = await process.stdout.readline()
        if not line:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            raise _ended(await process.wait())
        message: Message = json.loads(line)
        return message


def _ended(code: int | None) -> WorkError:
    return WorkError(
        f"the process with the model ended (exit code {code})",
        hint="ask again; if it was out of memory, close other programs or use a smaller model",
    )
