"""Every variant as GGUF, run by llama.cpp itself, predicts what the adapter does; or is refused."""

import contextlib
import json
import shutil
from dataclasses import replace

import gguf
import pytest
from transformers import AutoModelForCausalLM

from lorakit.data.chat_template.defaults import with_thinking_fixed
from lorakit.errors import DependencyError, ModelError, RecipeError, WorkError
from lorakit.export import gguf as exporter
from lorakit.export import llama_cpp, merged
from lorakit.export.adapter import fold_adapter
from lorakit.export.gguf import (
    ADAPTER_FILE,
    compare_output,
    end_of_turn,
    export_gguf,
    export_gguf_adapter,
    limit_context,
    merged_type,
    quantization,
    run_gguf,
)
from lorakit.export.gguf_convert import Conversion, convert_all
from lorakit.export.hf_files import set_thinking, write_config, write_tokenizer
from lorakit.export.merge_weights import write_merged
from lorakit.export.tuned_run import float32_model, open_source
from lorakit.export.verify_outputs import Reference, make_reference, predictions

from .conftest import CHATS, THINKING, decided, make_base, make_run

# Variants that change what a GGUF file holds; the others become the same plain merged folder, and
# that equals the adapter to the bit in `test_merged.py`.
MERGED = ("tied", "tied, head adapted", "added tokens", "rslora", "biases, rope scaling")
MERGED = (*MERGED, "sliding window", "several stops", "qlora")
# One base: "rslora" and "patterns" differ in their adapters alone.
ADAPTERS = ("rslora", "patterns")
UNPORTABLE = ("dora", "biases, rope scaling", "modules_to_save", "tied, head adapted")
TOKENS = 3
# Nats that llama.cpp may turn: it keeps keys and values in 16 bits.
ROUNDED = 1e-2


# Characters that SmolLM2's tokenizer spreads over up to four tokens.
TEXTS = ("你好，世界", "مرحبا، كيف", "🦙👩‍🚀 é", "ok Ωด้วย")


def along(folder, tokenizer, texts):
    """What the model of this folder predicts along these texts, as answers to one prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    prompt = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    answers = [tokenizer.encode(text) for text in texts]
    found = [predictions(model, prompt, answer) for answer in answers]
    return Reference([prompt] * len(texts), answers, found, frozenset([2]), 1.0)


@pytest.fixture(scope="module")
def heard(gguf_run, demo_model, smollm2_tokenizer, tmp_path_factory):
    """(how, variant) -> comparison, file, adapter's file, source, reference. One conversion, one
    process of llama.cpp for all.

    One by one each would cost 5 s of imports.
    """
    tokenizer = smollm2_tokenizer
    work = tmp_path_factory.mktemp("gguf")
    base, base_file = work / "base", work / "base.gguf"
    orders, files, references = [], {}, {}
    for number, variant in enumerate(dict.fromkeys((*MERGED, *ADAPTERS))):
        source = open_source(gguf_run(variant))
        references[variant] = source, make_reference(source, float32_model(source), 2, TOKENS)
        folder, folded = work / f"merged-{number}", work / f"folded-{number}"
        if variant in MERGED:
            folder.mkdir()
            write_merged(source, folder, "quantized", "float32")
            set_thinking(source, folder)
            limit_context(source, folder)
            files["merged", variant] = work / f"{number}.gguf", None
            orders.append(Conversion(folder, files["merged", variant][0], "F32", "a-name"))
        if variant in ADAPTERS:
            folded.mkdir()
            fold_adapter(source, folded)
            if not base.exists():
                base.mkdir()
                write_config(source, base, "float32", tied=source.tied)
                write_tokenizer(source, base)
                (base / "model.safetensors").symlink_to(source.folder / "model.safetensors")
                orders.append(Conversion(base, base_file, "F32", "a-base"))
            (work / str(number)).mkdir()
            files["adapter", variant] = base_file, work / str(number) / ADAPTER_FILE
            target = files["adapter", variant][1]
            orders.append(Conversion(folded, target, "F32", "a-name", base))
    references["embedded"] = source, along(demo_model, tokenizer, TEXTS)
    files["base", "embedded"] = work / "embedded.gguf", None
    orders.append(Conversion(demo_model, work / "embedded.gguf", "F16", "a-name"))
    convert_all(orders, lambda _: None, offline=False)
    chats = tuple([{"role": r, "content": t} for r, t in chat[:-1]] for chat in CHATS[:2])
    tasks = [task_of(*references[v], m, a and str(a), chats) for (_, v), (m, a) in files.items()]
    return {
        key: (compare_output(*references[key[1]], said, chats), *files[key], *references[key[1]])
        for key, said in zip(files, llama_cpp.run_tasks(tasks), strict=True)
    }


@pytest.mark.parametrize("variant", MERGED)
def test_a_merged_file_predicts_as_the_adapter(heard, variant):
    found, path, _, source, reference = heard["merged", variant]
    assert found.kl_per_token < 1e-3
    assert found.top1_agreement >= decided(reference, ROUNDED)[0]
    written = path.read_bytes()
    assert str(path.parent).encode() not in written
    assert str(source.run.path).encode() not in written


def test_characters_of_several_tokens_are_compared_place_by_place(heard, smollm2_tokenizer):
    """llama.cpp's own answers have no prediction where a character is not complete."""
    tokenizer = smollm2_tokenizer
    answers = [tokenizer.encode(text) for text in TEXTS]
    assert any("\ufffd" in tokenizer.decode(i) for answer in answers for i in answer)
    found = heard["base", "embedded"][0]
    assert found.positions == sum(map(len, answers))
    assert 0 < found.kl_per_token < 1e-3


def test_an_engine_that_does_not_stop_at_the_end_of_turn_is_refused(gguf_run):
    source = open_source(gguf_run("rslora"))
    deaf = llama_cpp.LlamaOutput(places=[], stops=False, chat_ids=[])
    with pytest.raises(WorkError, match=r"does not stop at '<\|im_end\|>'"):
        compare_output(source, Reference([], [], [], frozenset([2]), 1.0), deaf)


def test_the_end_of_turn_and_the_template_are_in_the_file(heard):
    _, path, _, source, _ = heard["merged", "several stops"]
    assert value_of(path, "tokenizer.ggml.eos_token_id") == 2
    template = value_of(path, "tokenizer.chat_template")
    assert template == with_thinking_fixed(source.tokenizer.chat_template)
    assert template == "{% set enable_thinking = false %}" + THINKING


def test_a_window_that_llama_cpp_ignores_bounds_the_context(heard):
    """Its Llama and Mistral attend to everything: beyond the window that is another model."""
    path = heard["merged", "sliding window"][1]
    assert value_of(path, "llama.context_length") == 128


def task_of(source, reference, model, *more):
    asks = reference.prompts, reference.answers, end_of_turn(source)
    return llama_cpp.Task(str(model), *asks, *more)


def value_of(path, key):
    return gguf.GGUFReader(path).get_field(key).contents()


@pytest.mark.parametrize("variant", ADAPTERS)
def test_an_adapter_file_predicts_as_the_adapter(heard, variant):
    found, *_, reference = heard["adapter", variant]
    assert found.kl_per_token < 1e-3
    assert found.top1_agreement >= decided(reference, ROUNDED)[0]


def test_an_adapter_without_effect_is_not_kept(heard, gguf_run, job):
    """Of an adapter that changes less than F16 does, as much is left as of none."""
    _, base, adapter, _, reference = heard["adapter", "rslora"]
    weak = replace(reference, base_kl=1e-12)
    with pytest.raises(WorkError, match=r"adapter.gguf: .* not nearer to the tuned model than its"):
        run_gguf(job(gguf_run("rslora")), weak, base, adapter, "F16")


def test_a_quantization_that_costs_more_than_tuning_changed_gets_a_hint(heard, gguf_run, job):
    _, path, _, _, reference = heard["merged", "rslora"]
    for effect, hinted in ((1e-12, True), (reference.base_kl, False)):
        order = job(gguf_run("rslora"))
        run_gguf(order, replace(reference, base_kl=effect), path, None, "F32")
        assert (
            any("F32 costs more than the tuning changed" in end for end in order.next_steps)
            is hinted
        )


@pytest.mark.parametrize("variant", UNPORTABLE)
def test_what_a_gguf_adapter_cannot_carry_is_refused_before(gguf_run, job, tmp_path, variant):
    with pytest.raises(ModelError, match="cannot be a GGUF adapter") as caught:
        export_gguf_adapter(job(gguf_run(variant)))
    assert "--to gguf" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_k_quants_are_written_and_run_in_one_command(gguf_run, job):
    order = job(gguf_run("rslora"), quant="q4_k_m")
    facts = export_gguf(order)
    assert facts["quantization"] == "Q4_K_M"
    assert facts["merged"]["rows_not_of_256"] == 16
    assert 1e-6 < facts["kl_per_token"] < 0.5
    assert [p.name for p in order.target.glob("*.gguf")] == [facts["file"]]


def test_an_adapter_is_written_and_run_in_one_command(gguf_run, job):
    """Its base, too, asks with an empty thought, though llama.cpp switches thinking on."""
    order = job(gguf_run("several stops"))
    facts = export_gguf_adapter(order)
    assert facts["kl_per_token"] < 1e-3
    assert sorted(p.name for p in order.target.iterdir()) == ["MANIFEST.json", "adapter.gguf"]


def instead_of_converting(monkeypatch, file):
    """The converter hands out `file`, made by it for another run."""
    monkeypatch.setattr(
        exporter, "convert_all", lambda orders, *_: shutil.copy(file, orders[0].target)
    )


def test_a_file_that_says_something_else_is_not_kept(gguf_run, job, heard, tmp_path, monkeypatch):
    instead_of_converting(monkeypatch, heard["merged", "biases, rope scaling"][1])
    with pytest.raises(WorkError, match="predicts something else"):
        export_gguf(job(gguf_run("rslora")))
    assert list(tmp_path.iterdir()) == []


def test_without_memory_for_models_chats_are_compared_all_the_same(
    gguf_run, job, heard, monkeypatch
):
    instead_of_converting(monkeypatch, heard["merged", "rslora"][1])
    monkeypatch.setattr(merged, "memory_missing", lambda _: "too little memory")
    facts = export_gguf(job(gguf_run("rslora"), "right"))
    assert "reads chats as training did" in facts["skipped"]
    assert facts["merged"]["tensors"] > 0
    order = job(gguf_run("rslora"), "wrong")
    template = order.source.tokenizer.chat_template
    order.source.tokenizer.chat_template = template.replace("<|im_start|>", "<|im_start|> ")
    with pytest.raises(WorkError, match="reads held-out chat 1 otherwise than in training"):
        export_gguf(order)
    assert not order.target.exists()


def test_a_file_that_llama_cpp_cannot_load_is_not_kept(gguf_run, job, heard, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_bytes(heard["merged", "biases, rope scaling"][1].read_bytes()[:200_000])
    instead_of_converting(monkeypatch, broken)
    with pytest.raises(WorkError, match="cannot run"):
        export_gguf(job(gguf_run("rslora")))
    assert list(tmp_path.iterdir()) == [broken]


def test_an_unknown_tokenizer_is_explained(tokenizer, tmp_path, job):
    """llama.cpp knows tokenizers by the hash of what they make of a sample text."""
    base = make_base(tmp_path / "base", tokenizer, "llama", {})
    path = base / "tokenizer.json"
    rules = json.loads(path.read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-9000]
    path.write_text(json.dumps(rules))
    with pytest.raises(ModelError, match="does not know this model's tokenizer") as caught:
        export_gguf(job(make_run(tmp_path / "run", base), verify=False))
    assert "vllm" in caught.value.hint


def test_a_file_is_made_of_a_sum_with_small_steps(gguf_run, job):
    order = job(gguf_run("rslora"))
    half = replace(
        order, source=replace(order.source, device=replace(order.source.device, dtype="bfloat16"))
    )
    assert [merged_type(half, kind) for kind in ("F16", "Q8_0", "Q4_K_M")] == ["float16"] * 3
    assert merged_type(half, "BF16") == "bfloat16"
    assert merged_type(order, "F16") == "float32"
    assert merged_type(replace(half, dtype="bfloat16"), "F16") == "bfloat16"


def test_quantizations_by_any_spelling(monkeypatch):
    assert [quantization(q) for q in (None, "fp16", "q4-k-m", "q8_0")] == [
        *("F16", "F16", "Q4_K_M", "Q8_0")
    ]
    with pytest.raises(RecipeError, match="did you mean Q4_K_M") as caught:
        quantization("Q4_KM")
    assert "F16, BF16, Q8_0" in caught.value.hint
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    assert quantization("Q8_0") == "Q8_0"
    with pytest.raises(DependencyError, match="xllamacpp"):
        quantization("Q4_K_M")


def test_without_the_engine_the_file_is_written_and_that_is_said(gguf_run, job, heard, monkeypatch):
    instead_of_converting(monkeypatch, heard["merged", "rslora"][1])
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    order = job(gguf_run("rslora"), quant="Q8_0", verify=False)
    assert export_gguf(order)["skipped"] == "xllamacpp is not installed"
    assert list(order.target.glob("*-Q8_0.gguf"))


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_a_model_in_place_of_an_adapter_is_not_kept(tmp_path, kind):
    from gguf import GGUFWriter

    from lorakit.export.gguf import require_adapter_file

    writer = GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = pytest.raises(WorkError, match="wrote a model, expected an adapter")
    with expected if kind == "model" else contextlib.nullcontext():
        require_adapter_file(tmp_path / "adapter.gguf")
