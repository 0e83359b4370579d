"""A folder of runs as training writes them, made by hand, and a client with the token."""

import json

import pytest

from lorakit import load_recipe
from lorakit.web.app import create_app

TOKEN = "secret-of-this-start"


def write_run(folder, steps=12, total=None, finished=True, loss=lambda i: 3 / (1 + i), **settings):
    """A run of the demo with `steps` rows of metrics; by default a finished one."""
    folder.mkdir(parents=True)
    total = total or steps
    given = {"model": "demo", "data": "demo", "max_steps": total, "seed": 7, **settings}
    (folder / "recipe.yaml").write_text(load_recipe(given).to_yaml())
    rows = []
    for i in range(steps):
        row = {"step": i + 1, "epoch": 0.1, "loss": loss(i), "grad_norm": 1.5}
        row |= {"learning_rate": 1e-4, "tokens": 900, "seconds": 0.5, "tokens_per_second": 1800.0}
        rows.append({**row, "memory_gb": 1.25})
        if i % 5 == 4:
            rows.append({"step": i + 1, "eval_loss": loss(i) + 0.1, "eval_perplexity": 3.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        "environment": {"versions": {"lorakit": "0.1.0"}, "device": "CPU", "kind": "cpu"},
        "plan": {"parts": {"frozen weights": 10**9}, "total_bytes": 10**9, "available_bytes": 2**34,
                 "tokens_per_second": 2000.0},
        "data_report": {"sources": [{"source": "demo", "rows": 240, "format": "question, answer"}],
                        "rows_read": 280, "examples_train": 240, "examples_val": 40,
                        "template": "the tokenizer's", "tokens_train": 9000,
                        "trained_tokens_train": 4000, "longest_example": 60, "cutoff_len": 256,
                        "faults": []},
    }  # fmt: skip
    if finished:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"0" * 1000)
        sample = {"prompt": "What <b>is</b> it?", "base": "no", "tuned": "a lamp", "reference": "a"}
        scores = [{"loss": v, "perplexity": 2 * v, "tokens": 50} for v in (3.5, 0.25)]
        files["eval"] = {"base": scores[0], "tuned": scores[1], "data": "held", "samples": [sample]}
        (folder / "export").mkdir()
        files["export/verify"] = {"merged": {"tensors": 5, "update_kept": 0.99}}
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def make_run():
    return write_run


@pytest.fixture
def folder(tmp_path):
    """A workspace with a finished and a stopped run, and a data file."""
    write_run(tmp_path / "runs" / "good")
    write_run(tmp_path / "runs" / "half", total=20, finished=False, learning_rate=3e-4)
    row = {"question": "What color?", "answer": "red"}
    (tmp_path / "my.jsonl").write_text((json.dumps(row) + "\n") * 3)
    return tmp_path


@pytest.fixture
def client(folder):
    from starlette.testclient import TestClient

    app = create_app(folder, TOKEN)
    with TestClient(app, base_url="http://127.0.0.1:8765", raise_server_exceptions=True) as made:
        made.headers["Origin"] = "http://127.0.0.1:8765"
        assert made.get(f"/?t={TOKEN}").status_code == 200
        yield made
