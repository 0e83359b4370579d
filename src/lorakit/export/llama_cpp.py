"""A GGUF file and prompts enter; what llama.cpp answers leaves, with its predictions.

llama.cpp runs in a process of its own (this file, run as a module): a file it does not like can end
in an assertion or a segmentation fault, which must not take lorakit with it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from lorakit.errors import WorkError

# Predictions travel as JSON: all 49,152 tokens of SmolLM2 take 0.4 s a place, 2,048 take 0.02 s.
# What is left out goes into one class "others", so that a divergence can only come out smaller;
# on SmolLM2 it holds less than 1e-3 of the probability.
TOP = 2048
SECONDS = 1800


@dataclass(frozen=True, slots=True)
class Task:
    """One file to load and what to ask of it: prompts as ids, chats as messages."""

    model: str
    prompts: list[list[int]]
    tokens: int
    adapter: str | None = None
    chats: tuple[list[dict[str, Any]], ...] = ()
    top: int = TOP
    context: int = 2048


@dataclass(frozen=True, slots=True)
class Said:
    """One greedy answer: its ids with the stop token, and whether it stopped by itself."""

    tokens: list[int]
    predictions: list[list[tuple[int, float]]]  # (id, log-probability), most likely first
    stopped: bool


@dataclass(frozen=True, slots=True)
class Heard:
    """What one file answered, and how it tokenized the chats with its own template."""

    answers: list[Said]
    chat_ids: list[list[int]]


def installed() -> bool:
    """True where the xllamacpp package is there."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask_all(tasks: Sequence[Task]) -> list[Heard]:
    """Load each file in turn and ask it.

    Raises:
        WorkError: llama.cpp refused a file, or broke on it.
    """
    done = subprocess.run(
        [sys.executable, "-m", "lorakit.export.llama_cpp"],
        input=json.dumps([asdict(task) for task in tasks]),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )
    lines = [x[8:] for x in done.stdout.splitlines() if x.startswith("LORAKIT ")]
    if done.returncode or len(lines) < len(tasks):
        failed = Path(tasks[len(lines)].model).name if len(lines) < len(tasks) else "a file"
        words = [x for x in done.stderr.strip().splitlines() if x.strip()]
        raise WorkError(
            f"llama.cpp cannot run {failed} (exit {done.returncode}): "
            f"{words[-1] if words else 'no reason given'}",
            hint="export with --to merged and serve that, and please report this model",
        )
    return [_heard(json.loads(line)) for line in lines]


def _heard(values: dict[str, Any]) -> Heard:
    answers = [
        Said(a["tokens"], [[(i, p) for i, p in place] for place in a["predictions"]], a["stopped"])
        for a in values["answers"]
    ]
    return Heard(answers, values["chat_ids"])


def divergence(expected: Any, found: list[list[tuple[int, float]]]) -> tuple[float, int]:
    """(sum of KL in nats over N places, places whose top token is equal).

    `expected` [N, V] are log-probabilities; tokens that llama.cpp did not name form one class.
    """
    total, same = 0.0, 0
    for row, place in zip(expected, found, strict=True):
        ids = [i for i, _ in place]
        p = row[ids].double().exp()
        q = [math.exp(logprob) for _, logprob in place]
        total += sum(
            float(a) * (math.log(float(a)) - math.log(b))
            for a, b in zip(p, q, strict=True)
            if a > 0 and b > 0
        )
        rest_p, rest_q = 1.0 - float(p.sum()), 1.0 - math.fsum(q)
        if rest_p > 1e-9 and rest_q > 1e-9:
            total += rest_p * math.log(rest_p / rest_q)
        same += int(row.argmax()) == ids[0]
    return total, same


# -- the other process ----------------------------------------------------------------------------


def _main() -> None:
    for task in json.load(sys.stdin):
        print("LORAKIT " + json.dumps(_ask(task)), flush=True)


def _ask(task: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = task["model"]
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = task["context"], 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = _cores()
    settings.warmup, settings.ui, settings.verbosity = False, False, -1
    if task["adapter"]:
        adapter = xllamacpp.CommonAdapterLoraInfo(task["adapter"], 1.0)
        settings.lora_adapters = [adapter]
    server = xllamacpp.Server(settings)
    order = {"temperature": 0, "n_probs": task["top"], "n_predict": task["tokens"]}
    # One by one: four at once took 10 s instead of 12 on two cores, and said other things.
    answers = [
        _said(_post(server, "/completion", {**order, "prompt": ids, "return_tokens": True}))
        for ids in task["prompts"]
    ]
    chat_ids = []
    for messages in task["chats"]:
        text = _post(server, "/apply-template", {"messages": messages})["prompt"]
        options = {"content": text, "add_special": True, "parse_special": True}
        chat_ids.append(_post(server, "/tokenize", options)["tokens"])
    return {"answers": answers, "chat_ids": chat_ids}


def _cores() -> int:
    """Physical ones that this process may use: a second thread on a core slows products down."""
    allowed = getattr(psutil.Process(), "cpu_affinity", lambda: range(os.cpu_count() or 1))()
    return min(len(allowed), psutil.cpu_count(logical=False) or len(allowed))


def _said(found: dict[str, Any]) -> dict[str, Any]:
    places = found["completion_probabilities"]
    return {
        "tokens": [place["id"] for place in places],
        "predictions": [[(t["id"], t["logprob"]) for t in x["top_logprobs"]] for x in places],
        "stopped": found["stop_type"] == "eos",
    }


def _post(server: Any, path: str, order: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        server.listening_address + path,
        json.dumps(order).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


if __name__ == "__main__":
    _main()
