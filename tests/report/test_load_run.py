"""The files of a run become one record, whatever is missing; damage is named."""

import math

import pytest

from lorakit.errors import RunError
from lorakit.report.load_run import finite, read_run, without_path
from lorakit.storage.run_dir import RunDir, append_metrics


def test_all_files_are_read(make_run):
    run = make_run(lora_r=8)
    append_metrics(run, [{"step": 8, "eval_loss": 1.5, "eval_perplexity": 4.5}])
    found = read_run(run)
    assert found.name == "harbor"
    assert found.finished
    assert [step for step, _ in found.column("loss")] == list(range(1, 9))
    assert [r["eval_loss"] for r in found.held] == [1.5]
    assert found.seconds == 16
    assert found.origins["lora_r"] == "argument"
    assert found.origins["lora_alpha"] == "default for lora"


def test_paths_of_this_machine_are_left_out(make_run):
    found = read_run(make_run(val_data="/home/me/held.jsonl"))
    assert found.shown["data"] == ["a.jsonl"]
    assert found.shown["val_data"] == "held.jsonl"
    assert found.shown["model"] == "some/model"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/a/b/c.jsonl", "c.jsonl"),
        ("../x/y", "y"),
        ("~/z.json", "z.json"),
        ("owner/name", "owner/name"),
        ("s3://bucket/key", "s3://bucket/key"),
        ([{"source": "./d.csv", "weight": 2.0}], [{"source": "d.csv", "weight": 2.0}]),
        (None, None),
        ("/", "/"),
    ],
)
def test_only_the_last_part_of_a_local_path_is_shown(value, shown):
    assert without_path(value) == shown


def test_no_number_is_none():
    assert (
        finite(math.nan) is finite(math.inf) is finite("1") is finite(None) is finite(True) is None
    )
    assert finite(3) == 3.0
    assert finite(1.7e308) is finite(-(10**400)) is None  # no chart could show them


def test_seconds_are_those_of_every_step_also_where_few_are_logged(make_run):
    rows = [{"step": 10, "loss": 1.0, "seconds": 2.0}, {"step": 20, "loss": 1.0, "seconds": 3.0}]
    assert read_run(make_run(rows=rows)).seconds == 50


def test_missing_files_are_empty(make_run):
    run = make_run()
    for path in (run.data_report, run.plan, run.eval, run.environment, run.metrics):
        path.unlink()
    found = read_run(run)
    assert (found.data, found.plan, found.environment, found.steps) == ({}, {}, {}, ())
    assert found.evaluation is None


@pytest.mark.parametrize(("text", "said"), [("{", "cannot be read"), ("[1]", "found list")])
def test_damage_names_the_file(make_run, text, said):
    run = make_run()
    run.plan.write_text(text)
    with pytest.raises(RunError, match=said) as caught:
        read_run(run)
    assert "plan.json" in caught.value.message


def test_origins_survive_values_that_look_like_comments(make_run):
    run = make_run(system="a  # b: c")
    assert read_run(run).origins["system"] == "argument"
    assert read_run(RunDir(run.path)).recipe.system == "a  # b: c"
