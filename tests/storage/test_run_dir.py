"""The run directory is the contract: paths, whole files, clear refusals."""

import json
from pathlib import Path

import pytest

from lorakit.errors import RunError, WorkError
from lorakit.storage.run_dir import (
    ADAPTER_WEIGHTS,
    RunDir,
    append_metrics,
    find_run,
    folder_size,
    read_metrics,
    write_json,
    write_text,
)


def test_checkpoints_are_listed_in_step_order_and_half_written_ones_are_not(tmp_path):
    run = RunDir(tmp_path)
    for name in ("step_000100", "step_000020", ".step_000200.tmp-1", "step_1000000", "other"):
        (run.checkpoints / name).mkdir(parents=True)
    assert [p.name for p in run.list_checkpoints()] == [
        "step_000020",
        "step_000100",
        "step_1000000",
    ]


@pytest.mark.parametrize("left", ["checkpoint", "adapter"])
def test_either_a_checkpoint_or_an_adapter_is_work_that_starting_over_would_lose(tmp_path, left):
    run = RunDir(tmp_path)
    write_text(run.recipe, "model: demo\n")
    append_metrics(run, [{"step": 1}])
    run.adapter.mkdir()
    assert not run.holds_work()
    if left == "checkpoint":
        run.checkpoint(1).mkdir(parents=True)
    else:
        (run.adapter / ADAPTER_WEIGHTS).write_bytes(b"x")
    assert run.holds_work()


def test_no_secret_is_written_into_a_run(tmp_path):
    write_json(tmp_path / "a.json", {"data": "https://x/y?token=abcdefgh", "key": "hf_" + "x" * 34})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "data": "https://x/y?token=***",
        "key": "***",
    }


def test_evaluations_and_steps_are_told_apart(tmp_path):
    run = RunDir(tmp_path)
    step, scored = {"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 1.0}
    append_metrics(run, [step, scored])
    with run.metrics.open("a") as handle:
        handle.write("[1]\n7\n")  # no rows
    assert read_metrics(run) == [step]
    assert read_metrics(run, held_out=True) == [scored]


def test_find_run_names_what_is_missing(tmp_path):
    with pytest.raises(RunError, match="no such run directory"):
        find_run(tmp_path / "nowhere")
    (tmp_path / "stray.txt").write_text("x")
    with pytest.raises(RunError, match=r"not a lorakit run .*stray\.txt"):
        find_run(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: demo\n")
    with pytest.raises(RunError, match="no adapter yet"):
        find_run(tmp_path)


@pytest.mark.parametrize(
    ("path", "gpus", "command"),
    [
        ("runs/x", 1, "lorakit train runs/x/recipe.yaml --resume"),
        ("my runs/x", 4, "lorakit train 'my runs/x/recipe.yaml' --resume --gpus 4"),
    ],
)
def test_the_command_that_goes_on_can_be_typed_as_it_stands(path, gpus, command):
    assert RunDir(Path(path)).going_on(gpus) == command


def test_write_replaces_whole_files_only(tmp_path):
    path = tmp_path / "a" / "x.json"
    write_json(path, {"a": "ä"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ä"}
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_full_disk_is_one_clear_error():
    with pytest.raises(WorkError, match="cannot write /dev/full"):
        write_text(Path("/dev/full/x"), "text")


def test_a_torn_metrics_line_is_left_out(tmp_path):
    run = RunDir(tmp_path)
    assert read_metrics(run) == []
    append_metrics(run, [{"step": 1}])
    append_metrics(run, [{"step": 2}])
    with run.metrics.open("a") as handle:
        handle.write('{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(run)] == [1, 2]


def test_rows_that_do_not_fit_on_the_disk_leave_the_file_as_it_was(tmp_path):
    import resource
    import signal

    run = RunDir(tmp_path)
    append_metrics(run, [{"step": 1}])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))
    try:
        with pytest.raises(OSError, match="large"):
            append_metrics(run, [{"step": 2}, {"step": 3}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    assert run.metrics.read_text() == '{"step": 1}\n'
    append_metrics(run, [{"step": 2}, {"step": 3}])
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3]


def test_the_size_of_a_folder_has_its_files_but_not_those_behind_links(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"0" * 70)
    (tmp_path / "a" / "y").write_bytes(b"0" * 5)
    (tmp_path / "a" / "link").symlink_to(tmp_path / "big")
    (tmp_path / "big").write_bytes(b"0" * 1000)
    assert folder_size(tmp_path / "a") == 75
    assert folder_size(tmp_path / "none") == 0
