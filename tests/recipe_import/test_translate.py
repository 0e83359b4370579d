"""Files of other tools, whole: recognized, translated, loadable, or one clear error."""

from pathlib import Path

import pytest

from lorakit.errors import RecipeError
from lorakit.recipe_file import load_recipe
from lorakit.recipe_import.translate import TOOLS, import_recipe, translate
from lorakit.recipe_import.write import recipe_text

FILES = Path(__file__).parent / "files"
RECIPES = sorted(p for p in FILES.iterdir() if p.is_file())
AXOLOTL = "base_model: m\nadapter: lora\ndatasets: [{path: d, type: chat_template}]\n"
LEVELS = zip("abcd", "bcde", strict=True)
BOMB = AXOLOTL + "a: &a [1, 1, 1, 1, 1]\n"
BOMB += "".join(f"{b}: &{b} [{f'*{a}, ' * 10}]\n" for a, b in LEVELS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_each_loads_as_a_recipe_and_no_key_is_passed_over(path, tmp_path):
    found = import_recipe(path)
    written = tmp_path / "r.yaml"
    written.write_text(recipe_text(found), encoding="utf-8")
    recipe = load_recipe(written).recipe
    assert {k: recipe.model_dump()[k] for k in found.values} == found.values
    keys = [k.split(":")[0] for k in path.read_text().splitlines() if k[:1].isalpha()]
    assert set(keys) <= {line.key for line in found.lines}
    assert all(line.note for line in found.left)


def test_the_effective_batch_and_the_rate_are_theirs():
    recipe = import_recipe(FILES / "axolotl.yml").values
    assert recipe["micro_batch_size"] * recipe["gradient_accumulation_steps"] == 8
    assert (recipe["learning_rate"], recipe["warmup_steps"], recipe["epochs"]) == (2e-4, 10, 2.0)
    assert recipe["data"] == ["harbor/letters:train[:20%]", "more/tides.jsonl"]
    assert "warmup_ratio" not in recipe


def test_what_has_no_match_names_what_stays():
    left = {line.key: line.note for line in import_recipe(FILES / "axolotl_old.yml").left}
    assert left["lr_scheduler"] == "rex: no such schedule here; lr_scheduler stays cosine"
    assert "lorakit schema" in left["my_own_key"]
    assert "sample_packing" not in left


def write(tmp_path, text):
    path = tmp_path / "x.yml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "found nothing"),
        ("- a\n- b\n", "found list"),
        ("model: demo\ndata: demo\n", "a lorakit recipe already"),
        ("batch: 3\nepochs: 1\n", "no known tool's recipe"),
        ("base_model: !!python/object:os.system m\nadapter: lora\n", "line 1: tags"),
        ("base_model: m\nadapter: [\n", "not valid YAML"),
        ("base_model: m\nadapter: lora\n", "no `datasets`"),
        ("base_model: 7\nadapter: lora\ndatasets: [{path: d}]\n", "what becomes `model`"),
        ("base_model: m\nadapter: lora\ndatasets: [{type: alpaca}]\n", "what becomes `data`"),
        (AXOLOTL + "rl: dpo\n", "rl: dpo"),
        (BOMB, "once its aliases are unfolded"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(tmp_path, text, said):
    with pytest.raises(RecipeError, match=r"x\.yml: ") as error:
        import_recipe(write(tmp_path, text))
    assert said in str(error.value)
    assert error.value.hint


def test_a_missing_file_and_one_that_is_no_text(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        import_recipe(tmp_path / "none.yml")
    (tmp_path / "x.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        import_recipe(tmp_path / "x.yml")


def test_anchors_and_merged_keys_are_read(tmp_path):
    text = AXOLOTL + "other: &o {lora_r: 4}\nlora_r: &r 12\nlora_alpha: *r\n<<: {num_epochs: 2}\n"
    values = import_recipe(write(tmp_path, text)).values
    assert (values["lora_r"], values["lora_alpha"], values["epochs"]) == (12, 12, 2.0)


@pytest.mark.parametrize(
    "line",
    ["lora_dropout: 1.5", "seed: -1", "learning_rate: fast", "num_epochs: [1]", "lora_r: {a: 1}",
     "micro_batch_size: auto", "sequence_len: 1e400", "warmup_ratio: 7", "val_set_size: -3",
     "special_tokens: 3", "plugins: 3", "lora_target_modules: 3", "bf16: maybe"],
)  # fmt: skip
def test_a_value_out_of_bounds_is_left_with_a_word(tmp_path, line):
    found = import_recipe(write(tmp_path, AXOLOTL + line + "\n"))
    written = tmp_path / "r.yaml"
    written.write_text(recipe_text(found), encoding="utf-8")
    load_recipe(written)
    key = line.split(":")[0]
    fate = next(each for each in found.lines if each.key == key)
    assert fate.status == "left" or key in ("special_tokens", "bf16"), fate


def test_values_of_any_kind_under_any_key_are_no_traceback(tmp_path):
    for tool in TOOLS:
        for value in (None, True, -1, 0.5, "x", [], ["x"], {}, {"x": [1]}, [[1]], [{"path": 3}]):
            source = dict.fromkeys(tool.keys, value)
            try:
                found = translate(source, tool, tmp_path / "a.yml")
            except RecipeError:
                continue
            assert len(found.lines) >= len(source)
