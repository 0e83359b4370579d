"""Run llama.cpp on a GGUF file and get its predictions along given answers.

The answers are given as token ids and scored one token at a time. Predictions along an answer that
the server generates have gaps: it omits positions where a character is split over several tokens
(Chinese, emoji), 13 of 32 in a Chinese sentence of SmolLM2.

llama.cpp runs in a subprocess (this file, run as a module): a bad file can end in an assertion or a
segmentation fault, which must not end lorakit.
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
from lorakit.storage.cache_dir import last_line

# Predictions are sent as JSON: all 49,152 tokens of SmolLM2 take 0.4 s per position, 2,048 take
# 0.02 s. All other tokens form one class, so that a divergence can only become smaller; on SmolLM2
# they have less than 1e-3 of the probability.
TOP = 2048
SECONDS = 1800
ROUNDING = 1e-5  # of a float32 sum of 250,000 probabilities

TokenLogits = list[tuple[int, float]]  # (id, log-probability) at one position, likeliest first


@dataclass(frozen=True, slots=True)
class Task:
    """One file to load, with prompts and answers as ids and chats as messages."""

    model: str
    prompts: list[list[int]]
    answers: list[list[int]]
    stop: int  # the token that ends an answer
    adapter: str | None = None
    chats: tuple[list[dict[str, Any]], ...] = ()
    top: int = TOP
    context: int = 2048


@dataclass(frozen=True, slots=True)
class LlamaOutput:
    """Predictions of one file along the answers, and its tokens of the chats."""

    places: list[list[TokenLogits]]  # for each answer, for each of its tokens
    stops: bool  # it ends an answer at the task's stop token
    chat_ids: list[list[int]]


def installed() -> bool:
    """Return True if the xllamacpp package is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def run_tasks(tasks: Sequence[Task]) -> list[LlamaOutput]:
    """Run all tasks in one subprocess.

    Raises:
        WorkError: llama.cpp refused a file or crashed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "lorakit.export.llama_cpp"],
        input=json.dumps([asdict(task) for task in tasks]),
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
        # Its threads synchronize at every operation. With other work on the same cores, spinning
        # took 53 s instead of 9 s.
        env={"OMP_WAIT_POLICY": "passive", **os.environ},
    )
    lines = [x[8:] for x in done.stdout.splitlines() if x.startswith("LORAKIT ")]
    if done.returncode or len(lines) < len(tasks):
        failed = Path(tasks[len(lines)].model).name if len(lines) < len(tasks) else "a file"
        raise WorkError(
            f"llama.cpp cannot run {failed} (exit {done.returncode}): {last_line(done.stderr)}",
            hint="export with --to merged and serve that, and please report this model",
        )
    replies = [json.loads(line) for line in lines]
    for task, values in zip(tasks, replies, strict=True):
        _check_counts(task, values["places"])
    return [LlamaOutput(v["places"], v["stops"], v["chat_ids"]) for v in replies]


def _check_counts(task: Task, found: list[list[TokenLogits]]) -> None:
    """Check the number of predictions: a missing one would shift all that follow."""
    for index, (answer, places) in enumerate(zip(task.answers, found, strict=True), 1):
        if len(places) != len(answer) or not all(places):
            raise WorkError(
                f"{Path(task.model).name}: llama.cpp returned predictions for "
                f"{sum(map(bool, places))} of the {len(answer)} tokens of the answer to held-out "
                f"prompt {index}; nothing was kept",
                hint="please report this with the version of xllamacpp",
            )


def scored(expected: Any, found: Sequence[TokenLogits]) -> tuple[Any, Any]:
    """Compare llama.cpp's predictions with the expected ones.

    Args:
        expected: log-probabilities [N, V]; tokens that llama.cpp did not return form one class.
        found: llama.cpp's predictions at N positions.

    Returns:
        (KL in nats [N], mask of equal top tokens [N]).
    """
    import torch

    rows = [_classes(row, position) for row, position in zip(expected, found, strict=True)]
    divergence = torch.cat([divergences(p[None], q[None]) for p, q in rows])
    tops = torch.tensor([position[0][0] for position in found])
    return divergence, expected.argmax(-1) == tops


def _classes(row: Any, position: TokenLogits) -> tuple[Any, Any]:
    """Log-probabilities [C] of one position by both models: the returned tokens, and the rest."""
    import torch

    # JSON has no NaN, so null means NaN. Float32 probabilities end at e^-87.
    named = {i: math.nan if lp is None else lp for i, lp in position if lp is None or lp > -80}
    ids, p = list(named), row.double().exp()
    q = torch.tensor(list(named.values()), dtype=torch.float64)
    rest = torch.ones_like(p, dtype=torch.bool)
    rest[ids] = False
    if not rest.any():
        return p[ids].log(), q
    rest_p = float(p[rest].sum())
    # The rest of q is known up to the rounding of its sum: use the value in that range nearest to
    # p's, which gives the smallest divergence.
    missing = max(0.0, 1.0 - float(q.exp().sum()))
    rest_q = min(max(rest_p, missing - ROUNDING), missing + ROUNDING)
    rest_logs = torch.tensor([rest_p, rest_q], dtype=torch.float64).log()
    return torch.cat([p[ids].log(), rest_logs[:1]]), torch.cat([q, rest_logs[1:]])


# -- the subprocess ----------------------------------------------------------------------------


def _main() -> None:
    for task in json.load(sys.stdin):
        print("LORAKIT " + json.dumps(_run_task(task)), flush=True)


def _run_task(task: dict[str, Any]) -> dict[str, Any]:
    import xllamacpp

    settings = server_settings(task["model"], task["context"])
    settings.n_gpu_layers = 0
    if task["adapter"]:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(task["adapter"], 1.0)]
    server = xllamacpp.Server(settings)
    # The bias makes the server generate the stop token at every position, so that no partial
    # character is generated; the returned probabilities are those before the bias. Each prompt
    # extends the last one by a token, so that the rest is in the cache.
    request = {"n_predict": 1, "n_probs": task["top"], "logit_bias": [[task["stop"], 1e6]]}
    request |= {"temperature": 0, "cache_prompt": True}
    places, stops = [], True
    for prompt, answer in zip(task["prompts"], task["answers"], strict=True):
        replies = [
            _post(server, "/completion", {**request, "prompt": prompt + answer[:i]})
            for i in range(len(answer))
        ]
        places.append([_place(reply) for reply in replies])
        stops = stops and all(reply["stop_type"] == "eos" for reply in replies)
    chat_ids = []
    for messages in task["chats"]:
        text = _post(server, "/apply-template", {"messages": messages})["prompt"]
        options = {"content": text, "add_special": True, "parse_special": True}
        chat_ids.append(_post(server, "/tokenize", options)["tokens"])
    return {"places": places, "stops": stops, "chat_ids": chat_ids}


def server_settings(file: str, context: int, parallel: int = 1) -> Any:
    """Settings of llama.cpp's server for a GGUF file; `context` is that of one answer."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = file
    settings.n_parallel, settings.n_ctx = parallel, parallel * context
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = _cores()
    settings.warmup, settings.ui, settings.verbosity = False, False, -1
    return settings


def _cores() -> int:
    """Count the physical cores for this process; a second thread per core slows products down."""
    allowed = getattr(psutil.Process(), "cpu_affinity", lambda: range(os.cpu_count() or 1))()
    return min(len(allowed), psutil.cpu_count(logical=False) or len(allowed))


def _place(reply: dict[str, Any]) -> list[tuple[int, float | None]]:
    """Predictions at one position; empty if the server returned none."""
    probabilities = reply.get("completion_probabilities") or [{"top_logprobs": []}]
    return [(t["id"], t["logprob"]) for t in probabilities[0]["top_logprobs"]]


def _post(server: Any, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        server.listening_address + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)


if __name__ == "__main__":
    _main()
