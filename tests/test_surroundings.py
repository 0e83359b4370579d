"""A run in an odd place: plain C locale, no home, a strange path, files for the owner alone."""

import os
import shutil
import stat
import subprocess
import sys

from lorakit.storage.run_dir import RunDir, read_metrics


def test_a_run_in_a_strange_place(tiny_model_dir, tiny_data, tmp_path):
    place = tmp_path / "my runs\nüber naïve 箱"
    place.mkdir()
    shutil.copytree(tiny_model_dir, place / "a model")
    shutil.copy(tiny_data, place / "däta.jsonl")
    command = [sys.executable, "-m", "lorakit", "train", "--offline", "--output", "ein Lauf"]
    command += ["--model", "a model", "--data", "däta.jsonl"]
    for pair in ("max_steps=2", "cutoff_len=64", "val_size=3", "learning_rate=2e-2"):
        command += ["--set", pair]
    strange = {"LC_ALL": "C", "HOME": "/dev/null", "TZ": "Nowhere/Else"}
    done = subprocess.run(
        command,
        cwd=place,
        env={**{k: v for k, v in os.environ.items() if k != "XDG_CACHE_HOME"}, **strange},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        preexec_fn=lambda: os.umask(0o077),
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"note: no cache in /dev/null/.cache/lorakit") == 1
    run = RunDir(place / "ein Lauf")
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    files = [run.recipe, run.metrics, run.eval, run.adapter / "adapter_config.json"]
    assert {stat.S_IMODE(f.stat().st_mode) for f in files} == {0o600}
