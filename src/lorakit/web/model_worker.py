"""Child process that does what needs torch or transformers: plans, prepared data, answers.

Requests are JSON lines on stdin, `{"id", "do", ...}`, answered on stdout under the same id:
`piece` for parts of an answer, then `result`, or `error` and `hint`.
`{"cancel": id}` ends an answer. It ends with its stdin, or after MINUTES without a request.
"""

from __future__ import annotations

import itertools
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from lorakit.errors import LorakitError

MINUTES = 15
# Tokens of one example on a page, and prepared data sets that are kept open.
SHOWN_TOKENS, OPEN_SETS = 700, 3
MOST_MODELS = 3


class ModelWorker:
    """Handlers of requests, with the data and models that they have opened."""

    def __init__(self) -> None:
        self.sets: dict[str, tuple[Any, Any, Any]] = {}
        self.models: list[tuple[Any, dict[str, str]]] = []  # with names of their runs by path

    def plan(self, settings: dict[str, Any], gpu: str | None = None) -> dict[str, Any]:
        """Forecast a run as `lorakit plan --json` does."""
        from lorakit.api import plan

        return plan(settings, gpu=gpu or None).as_dict()

    def data(self, source: Any, stamp: str) -> dict[str, Any]:
        """Prepare data as training does; return the report, lengths and faults.

        Args:
            source: settings, or the path of a run's recipe.
            stamp: changes with the files of the source.
        """
        from lorakit.data.inspection import inspect_prepared
        from lorakit.display.inspection_view import length_lines, verdict
        from lorakit.model.load import public_name

        tokenizer, prepared, recipe = self._prepared(source, stamp)
        found = inspect_prepared(prepared, tokenizer, recipe, public_name(recipe.model), 0)
        return {
            **found.as_dict(),
            "stopping": [fault.kind for fault in found.stopping],
            "lines": length_lines(found.lengths),
            "verdict": verdict(found),
            "counts": {"train": len(prepared.train), "val": len(prepared.val)},
        }

    def rows(
        self, source: Any, stamp: str, part: str, offset: int, count: int, find: str = ""
    ) -> dict[str, Any]:
        """Examples `offset` to `offset + count` of a part that contain the text or row `find`."""
        tokenizer, prepared, _ = self._prepared(source, stamp)
        examples, items = {
            "train": (prepared.train, prepared.train_conversations),
            "val": (prepared.val, prepared.val_conversations),
        }["val" if part == "val" else "train"]
        chosen: Any = range(len(examples))
        if find:
            chosen = _matching(examples, items, find)
        page = [int(i) for i in chosen[offset : offset + count]]
        shown = [{"number": i, **_tokens(tokenizer, examples[i])} for i in page]
        return {"total": len(chosen), "examples": shown}

    def chat(
        self,
        runs: list[str],
        run: str | None,
        messages: list[dict[str, str]],
        settings: dict[str, Any],
        system: str | None = None,
    ) -> Iterator[str]:
        """Yield pieces of an answer of a run, or of the base of the first run."""
        from lorakit.inference.generate import GenerationSettings, base_answers, stream_reply
        from lorakit.types import Message

        several, name = self._model(run or runs[0], runs)
        adapter = several.switch(name)
        turns = [Message(turn["role"], turn["content"]) for turn in messages]  # type: ignore[arg-type]
        spoken = adapter.system if system is None else system
        head = [Message("system", spoken)] if spoken else []
        made = GenerationSettings(**settings)
        if run is None:
            with base_answers(several.model):
                yield from stream_reply(several.model, adapter.tokenizer, [*head, *turns], made)
        else:
            yield from stream_reply(several.model, adapter.tokenizer, [*head, *turns], made)

    def _prepared(self, source: Any, stamp: str) -> tuple[Any, Any, Any]:
        """Tokenizer, prepared data and recipe of a source."""
        key = json.dumps(source, sort_keys=True) + stamp
        if key not in self.sets:
            from lorakit.api import load_prepared
            from lorakit.recipe.loader import load_recipe

            resolved = load_recipe(source)
            tokenizer, prepared = load_prepared(resolved, inspecting=True)
            self.sets[key] = tokenizer, prepared, resolved.recipe
            while len(self.sets) > OPEN_SETS:
                self.sets.pop(next(iter(self.sets)))
        return self.sets[key]

    def _model(self, path: str, runs: list[str]) -> tuple[Any, str]:
        """Model and adapter name of a run: on a base that is loaded already, if it has the same."""
        from lorakit.model.multi_adapter import MultiAdapterModel
        from lorakit.storage.run_dir import find_run

        for several, names in self.models:
            if path in names:
                return several, names[path]
        for several, names in self.models:
            try:
                names[path] = several.add(find_run(path))
            except LorakitError:
                continue
            return several, names[path]
        wanted = [pair for pair in self.models if set(pair[1]) & set(runs)]
        self.models = wanted[-(MOST_MODELS - 1) :]
        made = MultiAdapterModel.of(find_run(path))
        self.models.append((made, {path: made.active}))
        return made, made.active


def _matching(examples: Any, items: Any, find: str) -> Any:
    """Numbers of the examples whose row is `find` (file:17), or whose conversation contains it."""
    import numpy as np
    import pyarrow.compute as pc

    source, _, row = find.rpartition(":")
    if source and row.isdigit():
        rows = examples.column("row") == int(row)
        names = pc.equal(examples.table.data.column("source"), source).to_numpy()
        return np.flatnonzero(rows & names[examples.chosen])
    text = json.dumps(find, ensure_ascii=False)[1:-1]  # as it is written in the JSON of an item
    found = pc.match_substring(items.table.data.column("item"), text, ignore_case=True).to_numpy()
    return np.flatnonzero(found[examples.column("item_index")])


def _tokens(tokenizer: Any, example: Any) -> dict[str, Any]:
    """Decoded tokens of an example as [text, trained, special], the first SHOWN_TOKENS."""
    from lorakit.data.inspection import token_texts

    pieces = itertools.islice(token_texts(tokenizer, example), SHOWN_TOKENS)
    size = len(example.input_ids)
    return {
        "row": str(example.origin),
        "size": size,
        "trained": example.trained_tokens,
        "tokens": [(piece.text, piece.trained, piece.special) for piece in pieces],
        "left_out": max(0, size - SHOWN_TOKENS),
    }


def serve_requests(stdin: TextIO, answer: Callable[[dict[str, Any]], None]) -> None:
    """Handle requests one by one until stdin ends or nothing was asked for MINUTES."""
    requests: queue.Queue[dict[str, Any] | None] = queue.Queue()
    cancelled: set[int] = set()

    def read() -> None:
        for line in stdin:
            request = json.loads(line)
            if "cancel" in request:
                cancelled.add(request["cancel"])
            else:
                requests.put(request)
        requests.put(None)

    threading.Thread(target=read, daemon=True).start()
    worker = ModelWorker()
    while True:
        try:
            request = requests.get(timeout=MINUTES * 60)
        except queue.Empty:
            return
        if request is None:
            return
        number, handler = request.pop("id"), getattr(worker, request.pop("do"))
        try:
            result = handler(**request)
            if isinstance(result, Iterator):
                for piece in result:
                    if number in cancelled:
                        break
                    answer({"id": number, "piece": piece})
                result = None
            answer({"id": number, "result": result})
        except LorakitError as error:
            answer({"id": number, "error": error.message, "hint": error.hint})
        except Exception as error:  # the page shows it, and the next request is served
            text = f"{type(error).__name__}: {error}"[:500]
            answer({"id": number, "error": text, "hint": "report it as a bug of lorakit"})


def run_worker() -> None:
    """Serve requests; what libraries print goes to stderr."""
    from lorakit.console import quiet

    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    quiet()

    def answer(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")
        channel.flush()

    serve_requests(sys.stdin, answer)


if __name__ == "__main__":
    run_worker()
