"""The report is whole, loads nothing, and holds for every kind of run there is."""

import re

import pytest

from lorakit.report.page import duration, page
from lorakit.report.read import read_run
from lorakit.run_dir import ADAPTER_WEIGHTS, append_metrics

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
    outside = text.replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"(?<!&lt;img src=)https?://", outside)
    assert not re.search(r"\b(nan|inf|None)\b", read.text.partition("</style>")[2])
    return read


def test_a_finished_run(make_run, read_page):
    text = page(read_run(make_run()))
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
    plain = [tag for tag, _ in read_page(page(read_run(make_run("plain", **usual)))).tags]
    name = "<script>alert(1)<" + "img src=x onerror=a()>"
    run = make_run(text=EVIL, system=EVIL) if where == "text" else make_run(name)
    read = sound(page(read_run(run)), read_page)
    found = [tag for tag, _ in read.tags]
    assert found == plain
    assert ('alert("x")' if where == "text" else "alert(1)") in read.text
    assert "\x1b" not in read.text


def test_a_stopped_run_says_so_first(make_run, read_page):
    run = make_run(max_steps=20)
    (run.adapter / ADAPTER_WEIGHTS).unlink()
    run.eval.unlink()
    read = sound(page(read_run(run)), read_page)
    assert "Stopped after step 8 of 20" in read.text
    assert "Not evaluated: the run did not end" in read.text


def test_a_run_without_held_out_rows(make_run, read_page):
    run = make_run()
    run.eval.unlink()
    read = sound(page(read_run(run)), read_page)
    assert "no held-out rows, so nothing was evaluated" in read.text


def test_a_run_of_one_step_and_one_of_none(make_run, read_page):
    one = sound(page(read_run(make_run("one", rows=[row(1)]))), read_page)
    assert [tag for tag, _ in one.tags].count("svg") == 5
    none = sound(page(read_run(make_run("none", rows=[]))), read_page)
    assert "No step was finished." in none.text


def test_rows_without_a_number_are_told_and_marked(make_run, read_page):
    rows = [row(1), row(2, loss=None, grad_norm=None, skipped=1), row(3, loss=float("nan")), row(4)]
    text = page(read_run(make_run(rows=rows)))
    read = sound(text, read_page)
    assert "2 steps without a finite loss" in read.text
    assert "skipped: no finite number: step 2" in read.text
    assert 'class="gap"' in text
    only = sound(page(read_run(make_run("bad", rows=[row(1, loss=None)]))), read_page)
    assert "1 step without a finite loss" in only.text


def test_held_out_losses_are_drawn(make_run):
    run = make_run()
    without = page(read_run(run))
    append_metrics(run, [{"step": s, "eval_loss": 2.0, "eval_perplexity": 7.4} for s in (2, 4)])
    drawn = re.findall(r'<path class="held"[^>]*d="([^"]*)"', page(read_run(run)))
    assert drawn[0].count("L") == 2  # two in between, and the end's
    assert len(page(read_run(run))) > len(without)


def test_worse_than_before_is_shown_as_a_fault(make_run, edit):
    run = make_run()
    edit(run.eval, tuned={"loss": 3.0, "perplexity": 20.1, "tokens": 40})
    assert 'class="verdict bad">Held-out perplexity went from 7.39 to 20.10' in page(read_run(run))


def test_an_old_run_lacks_files_and_still_has_its_page(make_run, read_page, edit):
    run = make_run()
    for path in (run.plan, run.environment, run.data_report, run.export / "verify.json"):
        path.unlink()
    read = sound(page(read_run(run)), read_page)
    assert "no plan.json" in read.text
    again = make_run("lengthless")
    edit(again.data_report, lengths=None)
    assert "Longest example: 30 tokens." in page(read_run(again))


def test_durations_are_read_at_a_glance():
    assert [duration(s) for s in (4, 119, 600, 7300)] == ["4 s", "119 s", "10 min", "2 h 2 min"]
