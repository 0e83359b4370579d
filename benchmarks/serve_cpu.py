"""Tokens per second, first token and memory of each server that `lorakit serve` starts on a CPU.

    python benchmarks/serve_cpu.py RUN --output benchmarks/results/serve_cpu.json

Answers are greedy, of 64 tokens; of three rounds the best counts, since others may use the machine.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil

TOKENS, ROUNDS, AT_ONCE = 64, 3, 4


def answer(client, model, number):
    """(seconds to the first token, tokens per second after it) of one stream."""
    began, times = time.perf_counter(), []
    stream = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "user", "content": f"Tell a long story about {number} boats and the sea."}
        ],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
    )
    for event in stream:
        text = event.choices and event.choices[0].delta.content
        times += [time.perf_counter()] if text else []
    return times[0] - began, (len(times) - 1) / (times[-1] - times[0]), len(times)


def memory(pid):
    """Resident megabytes of the server, without lorakit's own process."""
    children = psutil.Process(pid).children(recursive=True)
    return round(sum(child.memory_info().rss for child in children) / 1e6)


def measure(run, engine):
    words = ["serve", str(run), "--engine", engine, "--port", "0"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", *words], stderr=subprocess.PIPE, text=True
    )
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"(http://\S+/v1)", line):
            break
    else:
        raise SystemExit("".join(lines))
    ready = time.perf_counter() - began
    client = openai.OpenAI(base_url=found.group(1), api_key="none", timeout=600)
    try:
        rows = []
        for round_number in range(ROUNDS):
            first, speed, _ = answer(client, run.name, round_number)
            start = time.perf_counter()
            with ThreadPoolExecutor(AT_ONCE) as pool:
                numbers = [100 * (round_number + 1) + i for i in range(AT_ONCE)]
                found_all = list(pool.map(lambda n: answer(client, run.name, n), numbers))
            together = sum(count for *_, count in found_all) / (time.perf_counter() - start)
            rows.append((first, speed, together))
        firsts, speeds, togethers = zip(*rows)
        return {
            "seconds_to_ready": round(ready, 1),
            "seconds_to_first_token": round(min(firsts), 3),
            "tokens_per_second_1": round(max(speeds), 1),
            "tokens_per_second_4_at_once": round(max(togethers), 1),
            "resident_mb": memory(process.pid),
        }
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = {engine: measure(args.run, engine) for engine in ("llama.cpp", "transformers")}
    values = {"cores": os.cpu_count(), "load": os.getloadavg()[0], "tokens": TOKENS, **found}
    text = json.dumps(values, indent=2) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
