"""A hostile model or adapter folder is refused before a library acts on what it says."""

import json
import shutil

import pytest

from lorakit.errors import ModelError
from lorakit.hardware import detect_device
from lorakit.model import untrusted
from lorakit.model.load import load_base, load_config, load_run, load_tokenizer
from lorakit.model.untrusted import check_adapter, check_tokenizer, read_object
from lorakit.recipe.schema import Recipe
from lorakit.storage.run_dir import RunDir

CPU = detect_device("float32", prefer="cpu")
RUNS_CODE = "import pathlib; pathlib.Path({canary!r}).touch()\n"


def recipe(model, **values):
    return Recipe(model=str(model), data="d", offline=True, **values)


@pytest.fixture
def model(tmp_path, tiny_model_dir):
    """A copy of the tiny model, and a function that changes one of its JSON files."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)

    def change(name="config.json", **values):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return folder

    return change


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"_attn_implementation_internal": "evil/kernel"}, "_attn_implementation_internal"),
        ({"_attn_implementation": "evil/kernel"}, "_attn_implementation"),
        ({"attn_implementation": "evil/kernel@main:run"}, "attn_implementation"),
        ({"_experts_implementation_internal": "evil/kernel"}, "_experts"),
        ({"text_config": {"_attn_implementation_internal": "evil/x"}}, "_attn_implementation"),
        ({"attn_kernel": "evil/kernel"}, "attn_kernel"),
        ({"hub_kernels": [{"kernel_repo": "evil/kernel"}]}, "kernel_repo"),
        ({"_own": {"a": 1}}, "_own"),
        ({"text_config": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map"),
        ({"text_config": {"auto_map": {"AutoConfig": "evil.Config"}}}, "auto_map"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 1e400}, "hidden_size"),
        ({"max_position_embeddings": True}, "max_position_embeddings"),
    ],
)
def test_a_config_that_reaches_out_or_has_no_measure_is_refused(model, tmp_path, values, key):
    folder = model(**values)
    (folder / "evil.py").write_text(RUNS_CODE.format(canary=str(tmp_path / "canary")))
    with pytest.raises(ModelError, match=key) as caught:
        load_base(recipe(folder), str(folder), CPU)
    assert caught.value.hint
    assert not (tmp_path / "canary").exists()


def test_what_published_configs_hold_is_taken(model):
    folder = model(
        _name_or_path="/home/author/model", _attn_implementation_autoset=True,
        _sliding_window_pattern=6, conv_kernel=4, attn_implementation="eager",
        transformers_version="4.1.0", time_step_limit=[0.0, {"__float__": "Infinity"}],
    )  # fmt: skip
    assert load_config(recipe(folder), str(folder)).hidden_size == 64


def test_code_runs_only_where_the_recipe_says_so_and_is_said_aloud(model, tmp_path, caplog):
    folder = model(auto_map={"AutoConfig": "own.Config"}, model_type="own-kind")
    canary = tmp_path / "canary"
    (folder / "own.py").write_text(
        RUNS_CODE.format(canary=str(canary))
        + "from transformers import LlamaConfig\nclass Config(LlamaConfig):\n"
        + "    model_type = 'own-kind'\n"
    )
    with pytest.raises(ModelError, match="run its own Python code"):
        load_config(recipe(folder), str(folder))
    assert not canary.exists()
    assert not caplog.records
    load_config(recipe(folder, trust_remote_code=True), str(folder))
    assert canary.exists()
    assert "with all your rights" in caplog.text


def test_other_kinds_of_models_and_broken_files(model):
    for values, reason in (
        ({"model_type": "t5", "architectures": ["T5Model"]}, "not a causal language model"),
        ({"model_type": "no-such-kind"}, "cannot be loaded"),
        ({"model_type": ["llama"]}, "cannot be loaded"),
        ({"rope_parameters": {"rope_type": "evil"}}, "cannot be loaded|rope"),
        ({"num_attention_heads": 0}, "cannot be loaded"),
    ):
        folder = model(**values)
        with pytest.raises(ModelError, match=reason):
            load_base(recipe(folder), str(folder), CPU)
        model(model_type="llama", num_attention_heads=4, rope_parameters=None)
    for text in ("[" * 100_000, "[1]", "{", '"x"', "\xff"):
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ModelError, match=r"config\.json: "):
            load_config(recipe(folder), str(folder))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"chat_template": [{"name": "../../x", "template": "a"}]}, "named '../../x'"),
        ({"chat_template": [{"name": "", "template": "a"}]}, "a chat template is named"),
        ({"chat_template": [{"name": 3, "template": "a"}]}, "a chat template is named"),
        ({"tokenizer_file": "../secret.json"}, "outside the model's folder"),
        ({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "auto_map"),
    ],
)
def test_a_tokenizer_that_reaches_out_is_refused(model, tmp_path, values, reason):
    (tmp_path / "secret.json").write_text("{}")
    folder = model("tokenizer_config.json", **values)
    with pytest.raises(ModelError, match=reason) as caught:
        load_tokenizer(recipe(folder), str(folder))
    assert caught.value.hint


def test_named_template_files_and_authors_paths(model):
    folder = model("tokenizer_config.json", tokenizer_file="/home/author/tokenizer.json")
    check_tokenizer(folder, recipe(folder))
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("a")
    check_tokenizer(folder, recipe(folder))
    (more / "a b.jinja").write_text("a")
    with pytest.raises(ModelError, match="named 'a b'"):
        check_tokenizer(folder, recipe(folder))


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"null", b'{"model": 3}', b"\xff\xfe", b"[" * 9999]
)
def test_a_broken_tokenizer_is_one_error(model, content):
    folder = model()
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(recipe(folder), str(folder))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "expected 'LORA'"),
        ({"peft_type": None}, "expected 'LORA'"),
        ({"auto_mapping": {"parent_library": "evil", "base_model_class": "X"}}, "auto_mapping"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil.core"}, "megatron_config"),
    ],
)
def test_an_adapter_that_reaches_out_is_refused(finish, tmp_path, values, reason):
    folder = tmp_path / "run"
    shutil.copytree(finish().run.path, folder)
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ModelError, match=reason) as caught:
        check_adapter(folder / "adapter", ["model.layers.0.mlp.down_proj"])
    assert caught.value.hint


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "tokenizer.json"])
def test_a_file_that_changed_since_training_is_named(finish, tmp_path, name):
    """One bit is enough; another tokenizer's file too."""
    folder = tmp_path / "adapter"
    shutil.copytree(finish().run.adapter, folder)
    check_adapter(folder, [])
    raw = bytearray((folder / name).read_bytes())
    raw[-2] ^= 1
    (folder / name).write_bytes(raw)
    with pytest.raises(ModelError, match=f"that training saved: {name} was changed") as caught:
        check_adapter(folder, [])
    assert "--resume" in caught.value.hint
    (folder / "MANIFEST.json").unlink()
    check_adapter(folder, [])


def test_a_torn_adapter_of_a_run_is_named_before_peft_sees_it(finish, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finish().run.path, folder)
    run, weights = RunDir(folder), folder / "adapter" / "adapter_model.safetensors"
    model = (finish().run.path / "recipe.yaml").parent
    text = run.recipe.read_text().replace("../", f"{model}/../", 1)
    run.recipe.write_text(text)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: not an intact safetensors"):
        load_run(run)


def test_settings_of_absurd_size_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "LARGEST_JSON", 10)
    (tmp_path / "a.json").write_text('{"a": "0123456789"}')
    with pytest.raises(ModelError, match="larger than"):
        read_object(tmp_path / "a.json")
    with pytest.raises(ModelError, match="cannot be read"):
        read_object(tmp_path / "b.json")
