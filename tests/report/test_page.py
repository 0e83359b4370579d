"""The report loads nothing, is sound for every kind of run, and its failure fails nothing."""

import json
import re

import pytest
from rich.console import Console

import lorakit
from lorakit import pipeline
from lorakit.errors import RunError, WorkError
from lorakit.recipe.loader import load_recipe
from lorakit.report.load_run import read_run
from lorakit.report.page import duration, renew_report, report_page, write_report
from lorakit.storage.run_dir import ADAPTER_WEIGHTS, append_metrics

EVIL = '<script>alert("x")</script>&<img src=http://x.example onerror=a()>\x1b[31m\'"'
SECTIONS = [
    "Before and after",
    "Training",
    "Memory: plan and measurement",
    "Data",
    "Exports",
    "Recipe",
    "Environment",
    "How to reproduce",
]


def row(step, **values):
    return {"step": step, "loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens": 9,
            "seconds": 1.0, "tokens_per_second": 9.0, "memory_gb": 0.01, **values}  # fmt: skip


def sound(text, read_page):
    """The page, parsed: whole, with all sections, without anything that loads or runs."""
    read = read_page(text)
    assert read.open == []
    assert re.findall(r"<h2>(.*?)</h2>", text) == SECTIONS
    names = {tag for tag, _ in read.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "form", "base", "a"}
    for _, attributes in read.tags:
        assert not {a for a in attributes if a in ("src", "href", "action") or a.startswith("on")}
        assert attributes.get("xlink:href", "#").startswith("#")
    outside = re.sub(r"http://www.w3.org/(2000/svg|1999/xlink)", "", text)
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"(?<!&lt;img src=)https?://", outside)
    assert not re.search(r"\b(nan|inf|None)\b", read.text.partition("</style>")[2])
    return read


def test_a_finished_run(make_run, read_page):
    text = report_page(read_run(make_run()))
    read = sound(text, read_page)
    assert "Held-out perplexity went from 7.39 to 2.72 (-63.2%)." in read.text
    assert text.count("<svg") == 5
    assert "Measured 6% over the plan." in read.text
    assert "30 of 90 are trained (33%)" in read.text
    assert "the plan expected 55" in read.text
    assert "0.1 million trained parameters" in read.text


@pytest.mark.parametrize("where", ["text", "name"])
def test_nothing_of_data_model_or_name_becomes_markup(where, make_run, read_page):
    usual = {"system": "x"} if where == "text" else {}
    plain = [tag for tag, _ in read_page(report_page(read_run(make_run("plain", **usual)))).tags]
    name = "<script>alert(1)<" + "img src=x onerror=a()>"
    run = make_run(text=EVIL, system=EVIL) if where == "text" else make_run(name)
    read = sound(report_page(read_run(run)), read_page)
    found = [tag for tag, _ in read.tags]
    assert found == plain
    assert ('alert("x")' if where == "text" else "alert(1)") in read.text
    assert "\x1b" not in read.text


def test_a_stopped_run_says_so_first(make_run, read_page):
    run = make_run(max_steps=20)
    (run.adapter / ADAPTER_WEIGHTS).unlink()
    run.eval.unlink()
    read = sound(report_page(read_run(run)), read_page)
    assert "Stopped after step 8 of 20" in read.text
    assert "Not evaluated: the run did not end" in read.text


def test_a_run_without_held_out_rows(make_run, read_page):
    run = make_run()
    run.eval.unlink()
    read = sound(report_page(read_run(run)), read_page)
    assert "not evaluated, since there are no held-out rows" in read.text


def test_a_run_of_one_step_and_one_of_none(make_run, read_page):
    one = sound(report_page(read_run(make_run("one", rows=[row(1)]))), read_page)
    assert [tag for tag, _ in one.tags].count("svg") == 5
    none = sound(report_page(read_run(make_run("none", rows=[]))), read_page)
    assert "No step was finished." in none.text


def test_rows_without_a_number_are_told_and_marked(make_run, read_page):
    rows = [row(1), row(2, loss=None, grad_norm=None, skipped=1), row(3, loss=float("nan")), row(4)]
    text = report_page(read_run(make_run(rows=rows)))
    read = sound(text, read_page)
    assert "2 steps without a finite loss" in read.text
    assert "Steps skipped, since loss or gradient was not finite: 2." in read.text
    assert 'class="missing"' in text
    only = sound(report_page(read_run(make_run("bad", rows=[row(1, loss=None)]))), read_page)
    assert "1 step without a finite loss" in only.text


def test_held_out_losses_are_drawn(make_run):
    run = make_run()
    without = report_page(read_run(run))
    append_metrics(run, [{"step": s, "eval_loss": 2.0, "eval_perplexity": 7.4} for s in (2, 4)])
    drawn = re.findall(r'<g class="held"><path d="([^"]*)"', report_page(read_run(run)))
    assert drawn[0].count("L") == 2  # two in between, and the end's
    assert len(report_page(read_run(run))) > len(without)


def test_worse_than_before_is_shown_as_a_fault(make_run, edit):
    run = make_run()
    edit(run.eval, tuned={"loss": 3.0, "perplexity": 20.1, "tokens": 40})
    assert 'class="verdict bad">Held-out perplexity went from 7.39 to 20.10' in report_page(
        read_run(run)
    )


def test_an_old_run_lacks_files_and_still_has_its_page(make_run, read_page, edit):
    run = make_run()
    for path in (run.plan, run.environment, run.data_report, run.export / "verify.json"):
        path.unlink()
    read = sound(report_page(read_run(run)), read_page)
    assert "no plan.json" in read.text
    again = make_run("lengthless")
    edit(again.data_report, lengths=None)
    assert "30 tokens; cutoff_len" in report_page(read_run(again))


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (4, 119, 600, 7300)] == ["4 s", "119 s", "10 min", "2 h 2 min"]


def test_scores_and_each_questions_three_answers(make_run, edit):
    run = make_run()
    sample = {"prompt": "<q>", "base": "<b>", "tuned": " <t>\n", "reference": "<r>"}
    edit(run.eval, samples=[sample], data="/home/me/held.jsonl")
    text = report_page(read_run(run))
    assert "<th>tuned</th>" in text
    for part in ("2.0000", "1.0000", "-1.0000", "7.39", "-63.2%"):
        assert f">{part}</td>" in text
    assert "Held out: held.jsonl, 40 trained tokens." in text
    assert '<div class="answers"><p>&lt;q&gt;</p>' in text
    for name in ("base", "tuned", "reference"):
        assert f'<section class="{name}"><h3>{name}</h3>&lt;{name[0]}&gt;</section>' in text
    assert "/home/me" not in text


def test_the_recipe_shows_what_was_chosen_before_the_defaults(make_run):
    found = read_run(make_run(lora_r=8))
    text = report_page(found).partition("<h2>Recipe</h2>")[2].partition("<h2>")[0]
    before, _, after = text.partition("<details>")
    assert "<code>lora_r</code>" in before
    assert "argument" in before
    assert '<code>lora_alpha</code> 32 <em class="soft">for lora</em>' in after
    assert "secret place" not in text
    assert sorted(re.findall(r"<code>(\w+)</code>", text)) == sorted(found.shown)


def test_the_short_recipe_makes_the_same_run(make_run, tmp_path, read_page):
    found = read_run(make_run(lora_r=8, epochs=2.0, method="qlora", system="Say: <b> # no"))
    text = read_page(report_page(found)).text
    path = tmp_path / "again.yaml"
    path.write_text(text.rpartition("recipe.yaml:")[2].partition("Repeats the run")[0])
    again = load_recipe(path, ['data=["../../secret place/a.jsonl"]']).recipe
    assert again == found.recipe
    assert "torch==2.13.0\n" in text
    assert "names of local files" in text


def test_exports_say_how_near_they_are_and_how_far_the_base_is(make_run, edit):
    run = make_run(text="why not")
    inner = {"kl_per_token": 2e-7, "top1_agreement": 1.0, "greedy_equal": 1.0, "positions": 9,
             "prompts": 3}  # fmt: skip
    edit(run.export / "verify.json", gguf={**inner, "format": "gguf", "merged": inner})
    text = report_page(read_run(run))
    for part in ("1.00e-07", "100.0% of 12", "not compared: why not", "gguf: merged"):
        assert part in text
    assert "differs by 0.5 nats per token" in text
    (run.export / "verify.json").unlink()
    assert "lorakit export RUN --to merged" in report_page(read_run(run))


def test_the_environment_has_versions_and_ranks(make_run, edit):
    run = make_run()
    reasons = {"kind": "k", "dtype": "d", "ranks": "2 on one machine <b>"}
    text = report_page(read_run(run))
    assert "torch 2.13.0+cpu" in text
    assert "Ranks" not in text
    # A package that was not there is not asked for again.
    edit(run.environment, reasons=reasons, versions={"torch": "2.13.0+cpu", "bitsandbytes": None})
    text = report_page(read_run(run))
    assert "<dt>Ranks</dt><dd>2 on one machine &lt;b&gt;</dd>" in text
    assert "pip install torch==2.13.0\nlorakit train" in text
    assert "bitsandbytes" not in text


def test_a_long_run_has_a_small_page_and_the_same_bytes_each_time(make_run):
    run = make_run(rows=[row(s, loss=2 + s % 7, grad_norm=1 + s % 5) for s in range(1, 20_001)])
    text = report_page(read_run(run))
    assert len(text) < 120_000
    assert report_page(read_run(run)) == text


SECRET = "hf_" + "a1B2c3D4e5F6g7H8i9J0"


def test_a_page_is_written_and_written_anew(make_run, tmp_path):
    run = make_run()
    assert write_report(run) == run.report
    first = run.report.read_text()
    (run.export / "verify.json").unlink()
    assert write_report(run).read_text() != first
    assert write_report(run, tmp_path / "new" / "r.html").read_text() == run.report.read_text()


def test_a_file_with_other_contents_is_one_message(make_run, edit):
    run = make_run()
    edit(run.data_report, faults=[{"kind": 3}])
    with pytest.raises(RunError, match="has unexpected contents"):
        write_report(run)


def test_a_failing_report_is_a_note(make_run):
    run, notes = make_run(), []
    run.plan.write_text("{")
    assert not renew_report(run, notes.append)
    assert len(notes) == 1
    assert notes[0].startswith("report.html was not written (")
    run.plan.unlink()
    assert renew_report(run, notes.append)
    assert len(notes) == 1


def test_no_secret_gets_into_it(make_run, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef01")
    text = f"see {SECRET} and https://me:word-of-pass@host/x and 0123456789abcdef01"
    page = write_report(make_run(text=text, system=text)).read_text()
    for secret in (SECRET, "word-of-pass", "0123456789abcdef01"):
        assert secret not in page
    assert "***" in page


def test_training_writes_it_and_eval_and_export_renew_it(finish, tiny_data):
    run = lorakit.open_run(finish(max_steps=3, eval_every=2).run.path)
    first = (run.path / "report.html").read_text()
    assert "Held-out perplexity went from" in first
    assert 'class="held"' in first
    assert "Examples by length" in first
    assert str(tiny_data.parent) not in first
    assert tiny_data.name in first
    run.export("adapter", verify=False)
    assert "not compared: disabled by --no-verify" in run.folder.report.read_text()
    (run.folder.report).unlink()
    run.evaluate(samples=0)
    assert run.folder.report.exists()
    assert run.report() == run.folder.report
    assert [row["step"] for row in run.held_out] == [2, 3]


def test_a_run_that_ended_with_a_fault_has_its_page_too(
    tiny_model_dir, tiny_data, tmp_path, monkeypatch
):
    def fails(*_):
        raise WorkError("diverged")

    monkeypatch.setattr(pipeline, "save_adapter", fails)
    with pytest.raises(WorkError, match="diverged"):
        lorakit.finetune(
            model=str(tiny_model_dir), data=tiny_data, output_dir=tmp_path / "run", max_steps=1,
            val_size=0, cutoff_len=64, offline=True, console=Console(quiet=True),
        )  # fmt: skip
    assert "Stopped after step 1 of 1" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_whose_report_cannot_be_made_is_trained_all_the_same(
    tiny_model_dir, tiny_data, tmp_path
):
    folder = tmp_path / "run"
    (folder / "report.html").mkdir(parents=True)  # a folder in its place
    run = lorakit.finetune(
        model=str(tiny_model_dir), data=tiny_data, output_dir=folder, max_steps=1, val_size=0,
        cutoff_len=64, offline=True,
    )  # fmt: skip
    assert run.finished
    assert json.loads(run.folder.plan.read_text())["parts"]
