"""A GGUF file, prompts and answers enter; what llama.cpp predicts along the answers leaves.

The answers are given as token ids and scored one token at a time. Predictions along an answer that
the server writes itself have gaps: it leaves out the places where a character is spread over
several tokens (Chinese, emoji), 13 of 32 in a Chinese sentence of SmolLM2.

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
from lorakit.export.divergence import divergences

# Predictions travel as JSON: all 49,152 tokens of SmolLM2 take 0.4 s a place, 2,048 take 0.02 s.
# What is left out goes into one class "others", so that a divergence can only come out smaller;
# on SmolLM2 it holds less than 1e-3 of the probability.
TOP = 2048
SECONDS = 1800
ROUNDING = 1e-5  # of a float32 sum of 250,000 probabilities


TokenLogits = list[tuple[int, float]]  # (id, log-probability) of one place, most likely first


@dataclass(frozen=True, slots=True)
class Task:
    """One file to load and what to ask of it: prompts and answers as ids, chats as messages."""

    model: str
    prompts: list[list[int]]
    answers: list[list[int]]
    stop: int  # the token that ends an answer
    adapter: str | None = None
    chats: tuple[list[dict[str, Any]], ...] = ()
    top: int = TOP
    context: int = 2048


@dataclass(frozen=True, slots=True)
class Heard:
    """What one file predicts along the answers, and how it tokenized the chats by its template."""

    places: list[list[TokenLogits]]  # for each answer, for each of its tokens
    stops: bool  # it ends an answer at the token of the task
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
        # Its threads wait for each other at every operation. Where other work runs on the same
        # cores, spinning meanwhile took 53 s for what takes 9 s.
        env={"OMP_WAIT_POLICY": "passive", **os.environ},
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
    found = [json.loads(line) for line in lines]
    for task, values in zip(tasks, found, strict=True):
        _check_counts(task, values["places"])
    return [Heard(v["places"], v["stops"], v["chat_ids"]) for v in found]


def _check_counts(task: Task, found: list[list[TokenLogits]]) -> None:
    """Predictions are compared place by place: one too few would shift all that follow."""
    for number, (answer, places) in enumerate(zip(task.answers, found, strict=True), 1):
        if len(places) != len(answer) or not all(places):
            raise WorkError(
                f"{Path(task.model).name}: llama.cpp gave predictions for "
                f"{sum(map(bool, places))} of the {len(answer)} tokens of the answer to held-out "
                f"prompt {number}; nothing was kept",
                hint="please report this with the version of xllamacpp",
            )


def scored(expected: Any, found: Sequence[TokenLogits]) -> tuple[Any, Any]:
    """(KL in nats, whether the top token is equal) of each of N places.

    `expected` [N, V] are log-probabilities; tokens that llama.cpp did not name form one class.
    """
    import torch

    rows = [_classes(row, place) for row, place in zip(expected, found, strict=True)]
    divergence = torch.cat([divergences(p[None], q[None]) for p, q in rows])
    tops = torch.tensor([place[0][0] for place in found])
    return divergence, expected.argmax(-1) == tops


def _classes(row: Any, place: TokenLogits) -> tuple[Any, Any]:
    """Log-probabilities [C] of one place, by both: the tokens that were named, and the rest."""
    import torch

    # JSON has no NaN: what is null was none. Float32 probabilities end at e^-87.
    named = {i: math.nan if lp is None else lp for i, lp in place if lp is None or lp > -80}
    ids, p = list(named), row.double().exp()
    q = torch.tensor(list(named.values()), dtype=torch.float64)
    rest = torch.ones_like(p, dtype=torch.bool)
    rest[ids] = False
    if not rest.any():
        return p[ids].log(), q
    rest_p = float(p[rest].sum())
    # What q's probabilities leave over is known to the rounding of their sum: of the values that
    # it may be, the one nearest to p's, which is the smallest divergence.
    left = max(0.0, 1.0 - float(q.exp().sum()))
    rest_q = min(max(rest_p, left - ROUNDING), left + ROUNDING)
    ends = torch.tensor([rest_p, rest_q], dtype=torch.float64).log()
    return torch.cat([p[ids].log(), ends[:1]]), torch.cat([q, ends[1:]])


# -- the other process ----------------------------------------------------------------------------


def _main() -> None:
    for task in json.load(sys.stdin):
        print("LORAKIT " + json.dumps(_ask(task)), flush=True)


def _ask(task: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = task["model"]
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = task["context"], 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = cores()
    settings.warmup, settings.ui, settings.verbosity = False, False, -1
    if task["adapter"]:
        adapter = xllamacpp.CommonAdapterLoraInfo(task["adapter"], 1.0)
        settings.lora_adapters = [adapter]
    server = xllamacpp.Server(settings)
    # Bias makes the stop token the answer at every place, so that no half of a character is one;
    # the probabilities are those before it. Each prompt is the last one and a token: all but that
    # is in the cache.
    order = {"n_predict": 1, "n_probs": task["top"], "logit_bias": [[task["stop"], 1e6]]}
    order |= {"temperature": 0, "cache_prompt": True}
    places, stops = [], True
    for prompt, answer in zip(task["prompts"], task["answers"], strict=True):
        said = [
            _post(server, "/completion", {**order, "prompt": prompt + answer[:i]})
            for i in range(len(answer))
        ]
        places.append([_place(one) for one in said])
        stops = stops and all(one["stop_type"] == "eos" for one in said)
    chat_ids = []
    for messages in task["chats"]:
        text = _post(server, "/apply-template", {"messages": messages})["prompt"]
        options = {"content": text, "add_special": True, "parse_special": True}
        chat_ids.append(_post(server, "/tokenize", options)["tokens"])
    return {"places": places, "stops": stops, "chat_ids": chat_ids}


def cores() -> int:
    """Physical ones that this process may use: a second thread on a core slows products down."""
    allowed = getattr(psutil.Process(), "cpu_affinity", lambda: range(os.cpu_count() or 1))()
    return min(len(allowed), psutil.cpu_count(logical=False) or len(allowed))


def _place(found: dict[str, Any]) -> list[tuple[int, float | None]]:
    """The predictions for one place; empty where the server gave none."""
    places = found.get("completion_probabilities") or [{"top_logprobs": []}]
    return [(t["id"], t["logprob"]) for t in places[0]["top_logprobs"]]


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
