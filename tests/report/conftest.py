"""A run's folder made of files alone, to be bent by each test."""

import json

import pytest
from tests.pages import Reader

from lorakit.recipe.loader import load_recipe
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, RunDir, append_metrics, write_json

PARTS = {"frozen weights": 9_000_000, "adapters (float32)": 400_000, "nothing much": 1}


@pytest.fixture
def read_page():
    return Reader


def row(step, **values):
    common = {"loss": 4 / step, "grad_norm": 1.5, "learning_rate": 1e-4, "tokens": 100}
    return {"step": step, **common, "seconds": 2.0, "tokens_per_second": 50.0, "memory_gb": 0.01,
            **values}  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """`make_run(name, rows, recipe values)`: the folder of a finished run of a few rows."""

    def make(name="harbor", rows=None, text="Hi", **values):
        run = RunDir(tmp_path / name)
        run.path.mkdir()
        settings = {"model": "some/model", "data": ["../../secret place/a.jsonl"], **values}
        run.recipe.write_text(load_recipe(settings).to_yaml())
        run.adapter.mkdir()
        (run.adapter / ADAPTER_WEIGHTS).touch()
        append_metrics(run, [row(step) for step in range(1, 9)] if rows is None else rows)
        fault = {"kind": text, "count": 3, "first_rows": ["a:1"], "action": text, "spoils": False}
        lengths = {"shortest": 3, "median": 9, "p95": 20, "longest": 30,
                   "bars": [{"begin": 0, "end": 9, "count": 5}]}  # fmt: skip
        data = {
            "sources": [{"source": text, "format": "text", "rows": 9}],
            **dict.fromkeys(("examples_train", "examples_val", "tokens_train"), 90),
            **{"trained_tokens_train": 30, "longest_example": 30, "cutoff_len": 64},
            **{"template": text, "faults": [fault], "lengths": lengths},
        }
        score = {"loss": 2.0, "perplexity": 7.39, "tokens": 40}
        sample = {"prompt": text, "base": text, "tuned": text, "reference": text}
        tuned = {**score, "loss": 1.0, "perplexity": 2.72}
        plan = {"parts": PARTS, "total_bytes": sum(PARTS.values()), "available_bytes": 2**34}
        write_json(run.data_report, data)
        write_json(run.plan, {**plan, "tokens_per_second": 55.0, "host_bytes": 0})
        write_json(run.eval, {"base": score, "tuned": tuned, "data": text, "samples": [sample]})
        found = {"python": "3.12.1", "system": "Linux", "device": text, "kind": "cpu",
                 "memory_bytes": 2**34, "dtype": "float32", "reasons": {"kind": "k", "dtype": "d"},
                 "versions": {"lorakit": "0.1.0", "torch": "2.13.0+cpu"}}  # fmt: skip
        write_json(run.environment, found)
        agreement = {"format": "merged", "kl_per_token": 1e-7, "top1_agreement": 1.0,
                     "greedy_equal": 1.0, "positions": 12, "prompts": 4,
                     "base_kl_per_token": 0.5}  # fmt: skip
        write_json(run.export / "verify.json", {"merged": agreement, text: {"skipped": text}})
        return run

    return make


@pytest.fixture
def edit():
    """`edit(path, key=value)`: a JSON file with some keys set anew."""

    def change(path, **values):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change
