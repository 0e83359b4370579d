"""Fixtures shared by all tests: the embedded model, its tokenizer, and tiny random models."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# As many test processes as cores, so one thread for each. On a busy machine threads that wait for
# one another took seven times as long: a tiny QLoRA run 66 s of processor time instead of 9 s.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

# What a shell may hold that commands and libraries heed: a width, colors, a login.
for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "CI", "HF_TOKEN"):
    os.environ.pop(name, None)

# The same examples on every machine, and no limit of time: a busy machine is no counterexample.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")

# Triton reads this when it is imported: without a card its kernels run in its CPU interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


# The files that take longest, to be begun first: at the end one process would be alone with them.
LONG = ("test_ranks_end_to_end.py", "test_crash.py", "export/test_gguf.py", "test_docs_blocks.py")
LONG += ("test_notebooks.py", "test_end_to_end.py", "test_offline.py", "ops/test_kernel_launch.py")
LONG += ("model/test_families.py", "web/test_browser.py", "serve/test_child.py")
LONG += ("sweeps/test_run_sweep.py", "planning/test_planner.py", "test_mixture_of_experts.py")


def pytest_collection_modifyitems(items):
    def place(item):
        name = item.path.as_posix()
        return next((i for i, long in enumerate(LONG) if name.endswith(f"/{long}")), len(LONG))

    items.sort(key=place)


def pytest_collection_finish():
    """Import what most tests need, so that `frozen_heap` covers it.

    torch and transformers are over a million objects. A run collects garbage several times on
    purpose, and going through all of them took half the time of many tests.
    """
    import lorakit.pipeline  # noqa: F401


def pytest_unconfigure():
    """Return the frozen objects, or Triton's bindings list each as leaked when the process ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="module")
def frozen_heap():
    """Take what earlier files made and still use out of the garbage collector's work."""
    # Objects of a test are many and short-lived: young collections took a seventh of the time.
    gc.set_threshold(50_000, 20, 100)
    gc.collect()
    gc.freeze()


VOCABULARY = 2048


@pytest.fixture(scope="session")
def kernel_device():
    """Where Triton kernels run in tests: the card, or the CPU through Triton's interpreter."""
    pytest.importorskip("triton", reason="the triton package is not installed")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def data_cache(tmp_path_factory):
    """Prepared data of tests stays out of the user's cache."""
    from lorakit.data import cache

    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "cache_home", lambda: folder)
        yield folder


@pytest.fixture(autouse=True, scope="session")
def short_answers():
    """Random models end no answer: 96 tokens of each took a tenth of the time of the tests."""
    from lorakit.inference import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "ANSWER_TOKENS", 8)
        yield


# Where the charts of a report are drawn; each test of a wheel, notebook or launch draws them, too.
DRAWN = ("/tests/display/", "/tests/report/", "/tests/test_run.py")


@pytest.fixture(autouse=True, scope="module")
def empty_charts(request):
    """Draw no curves but in `DRAWN`: a report's five charts took a third of a tiny run's time."""
    from tests.in_process import without_charts

    with pytest.MonkeyPatch.context() as patch:
        if not any(place in request.path.as_posix() for place in DRAWN):
            without_charts(patch.setattr)
        yield


@pytest.fixture(scope="session")
def demo_model():
    """Folder of SmolLM2-135M-Instruct in safetensors, as `model: demo` uses it."""
    from lorakit.model.demo_model import demo_model_dir

    return demo_model_dir()


@pytest.fixture(scope="session")
def smollm2_tokenizer(demo_model):
    """SmolLM2's own tokenizer with all its 49,152 words."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="session")
def tokenizer(smollm2_tokenizer, tmp_path_factory):
    """SmolLM2's tokenizer with its first 2,048 words, and the same ids.

    Loading all of them took 15% of the time of the tests, hashing them 6%, and a tiny model with
    49,152 logits a token spent most of its time on these.
    """
    import json

    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    smollm2_tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    bpe = values["model"]
    vocab = {word: number for word, number in bpe["vocab"].items() if number < VOCABULARY}
    bpe["merges"] = [pair for pair in bpe["merges"] if {*pair, "".join(pair)} <= vocab.keys()]
    bpe["vocab"] = vocab
    path.write_text(json.dumps(values, ensure_ascii=False), "utf-8")
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model_dir(tokenizer, tmp_path_factory):
    """A 2-layer random Llama (64 wide) with SmolLM2's real tokenizer, saved as a folder."""
    return make_tiny_model(tokenizer, tmp_path_factory.mktemp("tiny-model"))


def make_tiny_model(tokenizer, folder):
    """Save it into `folder`, which is returned."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Thirty short question/answer rows that a tiny model can learn by heart."""
    return make_tiny_data(tmp_path_factory.mktemp("data") / "colors.jsonl")


def make_tiny_data(path):
    """Write them to `path`, which is returned."""
    import json

    colors = ["red", "green", "blue", "gray", "pink"]
    with path.open("w") as handle:
        for i in range(30):
            row = {"question": f"What color is box {i}?", "answer": f"It is {colors[i % 5]}."}
            handle.write(json.dumps(row) + "\n")
    return path


def _tiny_recipe(model, data, folder, **values):
    """A resolved recipe that trains the tiny model in a second or two."""
    from lorakit.recipe.loader import load_recipe

    flags = {
        "model": str(model),
        "data": str(data),
        "output_dir": str(folder),
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 2e-2,
        "cutoff_len": 128,
        "val_size": 4,
        "dtype": "float32",  # bfloat16 would be chosen on some CPUs, and rounds otherwise on each
        "offline": True,
        **values,
    }
    return load_recipe(None, [], flags)


@pytest.fixture(scope="session")
def tiny_recipe():
    return _tiny_recipe


@pytest.fixture(scope="session")
def finish(tiny_model_dir, tiny_data, tmp_path_factory):
    """`finish(method, **recipe values)`: a finished tiny run, made once per set of values."""
    from rich.console import Console

    from lorakit.pipeline import fit

    made = {}

    def build(method="lora", **values):
        key = (method, repr(sorted(values.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("runs") / f"tiny-{method}"
            given = {"model": str(tiny_model_dir), "method": method, **values}
            resolved = _tiny_recipe(data=tiny_data, folder=folder, **given)
            made[key] = fit(resolved, Console(stderr=True, quiet=True))
        return made[key]

    return build


@pytest.fixture(scope="session")
def talker(smollm2_tokenizer, tmp_path_factory):
    """Folder of a model whose answers are certain; see `made_runs`."""
    from tests.made_runs import make_talker

    return make_talker(smollm2_tokenizer, tmp_path_factory.mktemp("talker"))


@pytest.fixture(scope="session")
def speaker(talker, tmp_path_factory):
    """`speaker(name, **recipe values)`: a run on the talker that says the words of `name`."""
    from tests.made_runs import talking_run

    made = {}

    def build(name, **values):
        key = (name, repr(sorted(values.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("talking") / name
            made[key] = talking_run(folder, talker, name, **values)
        return made[key]

    return build
