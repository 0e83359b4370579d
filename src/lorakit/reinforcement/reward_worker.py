"""Child process of `reward_process`: load one reward function and answer calls.

    python -m lorakit.reinforcement.reward_worker REQUESTS REPLIES SPEC

REQUESTS and REPLIES are file descriptors, SPEC is JSON: {"file", "function"} or {"pattern"}.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UnusableFunction(ValueError):
    """The file or the pattern cannot be used."""


def load_function(spec: dict[str, str]) -> Callable[..., Any]:
    """Import the function of a file, or make one of a pattern.

    Raises:
        UnusableFunction: the reason in one sentence.
    """
    if "pattern" in spec:
        try:
            pattern = re.compile(spec["pattern"])
        except (re.error, OverflowError, RecursionError) as error:
            raise UnusableFunction(f"not a regular expression: {error}") from error
        return lambda completions: [float(pattern.search(c) is not None) for c in completions]
    path, name = Path(spec["file"]), spec["function"]
    loader = importlib.util.spec_from_file_location(path.stem, path)
    if loader is None or loader.loader is None:
        raise UnusableFunction("not a Python file, expected a name ending in .py")
    module = importlib.util.module_from_spec(loader)
    sys.path.insert(0, str(path.parent))
    sys.modules[path.stem] = module  # pickles and dataclasses look modules up by name
    try:
        loader.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        raise UnusableFunction(f"cannot be imported: {describe_error(error, path)}") from error
    found = getattr(module, name, None)
    if not callable(found):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise UnusableFunction(f"has no function {name} (found: {', '.join(names) or 'none'})")
    return found


def accepted(function: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a function takes: all with **kwargs, else those it names."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return values
    return {p.name: values[p.name] for p in parameters if p.name in values}


def describe_error(error: BaseException, path: Path | None = None) -> str:
    """Type and message of an error, with the last line of the user's file that raised it."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    place = f" ({path.name}, line {lines[-1]})" if path and lines else ""
    message = str(error).strip().split("\n")[0][:200]
    return f"{type(error).__name__}: {message}{place}" if message else type(error).__name__ + place


def as_numbers(values: Any) -> Any:
    """A list of Python numbers from a list, array or tensor; other values as their type's name."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        return f"{type(values).__name__}"
    return [v.item() if hasattr(v, "item") else v for v in values]


def reply_to(function: Callable[..., Any], values: dict[str, Any], path: Path | None) -> Any:
    """Call the function; return the reply as JSON values."""
    try:
        numbers = as_numbers(function(**accepted(function, values)))
    except Exception as error:  # the user's function may raise anything
        return {"error": f"raised {describe_error(error, path)}"}
    if isinstance(numbers, str):
        expected = len(values["completions"])
        return {"error": f"returned {numbers}, expected a list of {expected} numbers"}
    return {"values": numbers}


def answer_calls(requests: int, replies: int, spec: dict[str, str]) -> None:
    """Answer calls until the pipe closes."""
    path = Path(spec["file"]) if "file" in spec else None
    with os.fdopen(requests, encoding="utf-8") as calls, os.fdopen(replies, "w") as out:

        def send(reply: dict[str, Any]) -> None:
            out.write(json.dumps(reply, default=str) + "\n")
            out.flush()

        try:
            function = load_function(spec)
        except UnusableFunction as error:
            send({"error": str(error)})
            return
        send({"values": []})
        for line in calls:
            send(reply_to(function, json.loads(line), path))


if __name__ == "__main__":
    answer_calls(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
