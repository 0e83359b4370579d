"""Recipe with origins, exports, environment, and how to make the run again."""

import re

from lorakit.recipe_file import load_recipe
from lorakit.report.made import environment, exports, recipe, reproduce
from lorakit.report.read import read_run


def test_the_recipe_shows_what_was_chosen_before_the_defaults(make_run, read_page):
    text = "".join(recipe(read_run(make_run(lora_r=8))))
    before, _, after = text.partition("<details>")
    assert "<code>lora_r</code>" in before
    assert "argument" in before
    assert "<code>lora_alpha</code>" in after
    assert '<code>lora_alpha</code> 32 <em class="soft"> for lora</em>' in after
    assert "secret place" not in text


def test_every_setting_is_shown_once(make_run):
    found = read_run(make_run())
    keys = re.findall(r"<code>(\w+)</code>", "".join(recipe(found)))
    assert sorted(keys) == sorted(found.shown)


def test_the_short_recipe_makes_the_same_run(make_run, tmp_path, read_page):
    found = read_run(make_run(lora_r=8, epochs=2.0, method="qlora", system="Say: <b> # no"))
    text = "".join(reproduce(found))
    yaml = read_page(text).text.partition("recipe.yaml:")[2].partition("With the same")[0]
    path = tmp_path / "again.yaml"
    path.write_text(yaml)
    again = load_recipe(path, ['data=["../../secret place/a.jsonl"]']).recipe
    assert again == found.recipe
    assert "torch==2.13.0 " in text or "torch==2.13.0\n" in text
    assert "names of local files" in text


def test_exports_say_how_near_they_are_and_how_far_the_base_is(make_run):
    text = "".join(exports(read_run(make_run(text="why not"))))
    assert "1.00e-07" in text
    assert "100.0% of 12" in text
    assert "not compared: why not" in text
    assert "0.5 nats a token away" in text


def test_inner_forms_of_an_export_are_shown_too(make_run, edit):
    run = make_run()
    inner = {"kl_per_token": 2e-7, "top1_agreement": 1.0, "greedy_equal": 1.0, "positions": 9,
             "prompts": 3}  # fmt: skip
    edit(run.export / "verify.json", gguf={**inner, "format": "gguf", "merged": inner})
    assert "gguf: merged" in "".join(exports(read_run(run)))


def test_nothing_exported_says_how(make_run):
    run = make_run()
    (run.export / "verify.json").unlink()
    assert "lorakit export RUN --to merged" in "".join(exports(read_run(run)))


def test_the_environment_has_versions(make_run):
    assert "torch 2.13.0+cpu" in environment(read_run(make_run()))


def test_a_package_that_was_not_there_is_not_asked_for_again(make_run, edit):
    run = make_run()
    edit(run.environment, versions={"torch": "2.13.0+cpu", "bitsandbytes": None})
    found = read_run(run)
    assert "pip install torch==2.13.0\n" in "".join(reproduce(found)).replace("</", "\n</")
    assert "bitsandbytes" not in environment(found)


def test_several_ranks_are_named(make_run, edit):
    run = make_run()
    assert "Ranks" not in environment(read_run(run))
    edit(run.environment, reasons={"kind": "k", "dtype": "d", "ranks": "2 on one machine <b>"})
    assert "<dt>Ranks</dt><dd>2 on one machine &lt;b&gt;</dd>" in environment(read_run(run))
