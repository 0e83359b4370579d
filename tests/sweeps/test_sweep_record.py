"""sweep.json: written, read back, ranked, and refused if it is damaged."""

import json

import pytest

from lorakit.errors import RunError
from lorakit.sweeps.sweep_record import RunRecord, SweepDir, SweepRecord, read_record
from lorakit.sweeps.variations import Range


def finished(name, configuration, loss, **values):
    return RunRecord(name, configuration, {"lora_r": 8}, "finished", 6, 6, held_out=loss, **values)


def test_what_is_written_is_read_back(tmp_path):
    vary = {"lora_r": [8, 16], "learning_rate": Range(1e-5, 1e-3, False, True)}
    record = SweepRecord(vary, 2, True, None, True, [[0, 1], [1]])
    record.runs = [finished("a", 0, 1.5, rungs={"3": 2.0}), RunRecord("b", 1, {}, reason="x")]
    record.write(SweepDir(tmp_path))
    assert read_record(SweepDir(tmp_path)) == record


def test_the_best_configuration_has_the_lowest_mean_of_its_seeds():
    runs = [finished("a1", 0, 1.0), finished("a2", 0, 2.0), finished("b1", 1, 1.4)]
    record = SweepRecord({}, runs=[*runs, finished("b2", 1, 1.3)])
    assert record.ranking() == [(1.35, 1), (1.5, 0)]
    assert record.best().name == "b2"
    record.runs[3].state = "failed"
    assert [number for _, number in record.ranking()] == [0]
    record.comparable = False
    assert record.best() is None


def test_runs_without_a_finite_loss_are_not_ranked():
    record = SweepRecord({}, runs=[finished("a", 0, None), RunRecord("b", 1, {})])
    assert record.ranking() == []
    assert record.best() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"waiting"', '"running away"'),
        lambda text: text.replace('"name"', '"nam"'),
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_a_damaged_record_is_one_clear_error(tmp_path, change):
    folder = SweepDir(tmp_path)
    SweepRecord({}, runs=[RunRecord("a", 0, {})]).write(folder)
    folder.record.write_text(change(folder.record.read_text()))
    with pytest.raises(RunError, match="is damaged") as caught:
        read_record(folder)
    assert "--resume" in caught.value.hint


def test_other_folders_and_versions_are_named(tmp_path):
    folder = SweepDir(tmp_path)
    with pytest.raises(RunError, match="holds no sweep"):
        read_record(folder)
    SweepRecord({}).write(folder)
    values = json.loads(folder.record.read_text())
    folder.record.write_text(json.dumps({**values, "format": 99}))
    with pytest.raises(RunError, match="format 99"):
        read_record(folder)
