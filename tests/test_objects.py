"""Python objects in place of files and settings: each kind goes through `finetune` and is seen."""

import json
import shutil

import pytest
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from tests.finetuned import ROWS, adapter, same, trainer_in
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments
from trl import SFTConfig

import lorakit
from lorakit.errors import LorakitError, ModelError, RecipeError
from lorakit.storage.run_dir import RunDir

QUIET = Console(quiet=True)


@pytest.fixture
def train(tiny_model_dir, tmp_path):
    return trainer_in(tmp_path, tiny_model_dir)


def test_a_dataset_trains_as_a_file_with_the_same_rows(train, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    of_file = train("file", train_dataset=None, data=str(path))
    assert same(train("dataset", train_dataset=Dataset.from_list(ROWS)), of_file)


def test_rows_of_an_object_are_named_by_number(tiny_model_dir):
    rows = [*ROWS, {"question": "", "answer": ""}]
    found = lorakit.inspect(model=str(tiny_model_dir), train_dataset=rows)
    (name,) = [row for fault in found.report.faults for row in fault.first_rows]
    assert name.startswith("train_dataset-")
    assert name.endswith(".jsonl:13")


def test_held_out_rows_of_an_object(train, tiny_model_dir):
    run = train(val_size=None, eval_dataset=Dataset.from_list(ROWS[:3]))
    kept = [json.loads(line) for line in run.folder.validation.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in kept] == [r["question"] for r in ROWS[:3]]
    data = lorakit.prepare(model=str(tiny_model_dir), train_dataset=ROWS, eval_dataset=ROWS[:3])
    assert (len(data["train"]), len(data["validation"])) == (12, 3)


def test_a_run_from_an_object_resumes_with_it_and_from_its_recipe(train):
    given = {"max_steps": 2, "save_every": 1, "val_size": 0}
    whole = train("whole", **given)
    for name in ("object", "recipe"):
        cut = RunDir(whole.path.with_name(name))
        shutil.copytree(whole.path, cut.path)
        shutil.rmtree(cut.checkpoint(2))
        shutil.rmtree(cut.adapter)
    assert same(train("object", **given, resume=True), whole)
    assert same(lorakit.finetune(cut.recipe, resume=True, console=QUIET), whole)


def test_two_sources_for_one_setting_are_refused(train):
    with pytest.raises(RecipeError, match="and argument train_dataset is"):
        train(data="other.jsonl")
    with pytest.raises(RecipeError, match=r"lora_r: 4 .*argument peft_config is 8; keep one"):
        train(peft_config=LoraConfig(r=8))


class Steps(TrainerCallback):
    def __init__(self):
        self.steps, self.ended = [], 0

    def on_step_end(self, args, state, control, **_):
        self.steps.append(state.global_step)

    def on_train_end(self, args, state, control, **_):
        self.ended += 1


def test_callbacks_see_the_run_and_may_stop_it(train):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = control.should_save = state.global_step == 3

    seen = Steps()
    run = train(callbacks=[seen, Stop], max_steps=9)
    assert (seen.steps, seen.ended) == ([1, 2, 3], 1)
    assert run.finished
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    assert run.trainer_state.global_step == 3
    with pytest.raises(LorakitError, match="callbacks has a int, expected"):
        train("other", callbacks=[7])


def test_metrics_score_answers_of_base_and_tuned(train):
    def lines(text):
        return len(text)

    metrics = {
        "length": lambda answer, reference: lines(answer),
        "reference": lambda answer, reference: reference == "It is red.",
        "broken": lambda answer, reference: 1 / 0,
        "nan": lambda answer, reference: float("nan"),
    }
    out = Console(record=True, width=200)
    run = train(metrics=metrics)
    found = run.evaluation.metrics
    assert set(found) == {"length", "reference"}
    assert found["reference"] == {"base": 1.0, "tuned": 1.0, "rows": 2}
    out.print(run.evaluation)
    text = out.export_text()
    assert "length" in text
    assert "reference" in text
    assert ">length<" in run.folder.report.read_text()
    with pytest.raises(LorakitError, match="metrics: a is a int, expected a function"):
        train("other", metrics={"a": 1})


def test_a_lora_config_gives_its_values(train):
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], lora_bias=True)
    run = train(peft_config=config, lora_r=2)
    saved = json.loads((run.adapter / "adapter_config.json").read_text())
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "lora_bias")
    assert [saved[name] for name in names] == [2, 6, 0.0, ["q_proj"], True]
    assert any("lora_B.bias" in name for name in adapter(run))
    with pytest.raises(RecipeError, match="task_type is SEQ_CLS"):
        train("other", peft_config=LoraConfig(task_type="SEQ_CLS"))
    with pytest.raises(RecipeError, match="peft_config is a int, expected a LoraConfig"):
        train("other", peft_config=3)


@pytest.mark.parametrize(
    ("lora", "fault"),
    [
        ({"lora_bais": True}, "LoraConfig has no such field; did you mean lora_bias?"),
        ({"layer_replication": [[0, 2]]}, "not supported: the trained model would have other"),
        ({"use_qalora": True}, "not supported: training with it is not verified"),
    ],
)
def test_fields_of_lora_config_that_cannot_be_kept_are_refused(train, lora, fault):
    with pytest.raises(RecipeError) as caught:
        train(lora=lora)
    assert fault in caught.value.message


def test_an_object_of_training_arguments_gives_all_its_values(train):
    given = SFTConfig(
        max_steps=1, learning_rate=3e-4, adam_beta2=0.9, max_length=64, bf16=False, use_cpu=True
    )
    recipe = train(training_args=given, settings={"val_size": 2}).recipe
    assert (recipe.learning_rate, recipe.max_steps, recipe.cutoff_len) == (3e-4, 1, 64)
    assert recipe.training_args == {"adam_beta2": 0.9}
    # TRL's defaults, since the object has them.
    assert (recipe.lr_scheduler, recipe.warmup_steps) == ("linear", 0)
    assert (recipe.micro_batch_size, recipe.gradient_accumulation_steps) == (8, 1)
    # These change no step, and lorakit's choice stays.
    assert (recipe.gradient_checkpointing, recipe.log_every) == ("auto", 1)


@pytest.mark.parametrize("fused_layers", ["on", "off"])
def test_noise_on_embeddings_reaches_the_layers(train, fused_layers):
    given = {"fused_layers": fused_layers, "packing": False, "max_steps": 1, "val_size": 0}
    noise = train("noise", training_args={"neftune_noise_alpha": 50.0}, **given)
    assert not same(noise, train("silent", **given))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"adam_beta3": 0.5}, "adam_beta3: SFTConfig has no such field; did you mean adam_beta"),
        ({"label_smoothing_factor": 0.1}, "is not passed on: the loss is computed"),
        ({"torch_empty_cache_steps": 3}, "it has no effect on lorakit's training loop"),
        ({"neftune_noise_alpha": 5.0}, "packed rows have the tokens of several examples"),
        ({"lr_scheduler_kwargs": {"cycles": 2}}, "lr_scheduler: cosine: "),
        ({"lr_scheduler_kwargs": 3}, "expected a mapping"),
    ],
)
def test_fields_without_effect_are_refused_by_name(train, values, fault):
    with pytest.raises(RecipeError) as caught:
        train(training_args=values)
    assert fault in caught.value.message


def test_training_arguments_of_another_type(train):
    with pytest.raises(RecipeError, match="training_args is a int, expected SFTConfig"):
        train(training_args=3)
    recipe = train(
        training_args=TrainingArguments(max_steps=1, seed=7), settings={"val_size": 2}
    ).recipe
    assert (recipe.seed, recipe.max_steps, recipe.learning_rate) == (7, 1, 5e-5)


def test_another_optimizer_and_schedule_resume_to_the_same_bits(train):
    given = {
        "optimizer": "lion_32bit",
        "lr_scheduler": "cosine_with_min_lr",
        "training_args": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "adam_beta1": 0.5},
        "loraplus_lr_ratio": 4.0,
        "val_size": 0,
    }
    whole = train("whole", max_steps=2, **given)
    assert len({row["learning_rate"] for row in whole.metrics}) == 2
    train("cut", max_steps=1, **given)
    assert same(train("cut", max_steps=2, resume=True, **given), whole)


def test_a_tokenizer_of_the_program_is_used_and_saved(train, tiny_model_dir):
    with pytest.raises(ModelError, match="tokenizer is a int"):
        train("other", tokenizer=3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>", "<|im_start|>~")
    run = train(tokenizer=tokenizer)
    assert "<|im_start|>~" in AutoTokenizer.from_pretrained(run.adapter).chat_template
