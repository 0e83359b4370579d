"""A source string finds what is there, here first and then in the recipe's folder."""

import os

import pytest

from lorakit.data.sources.locate import SUFFIXES, DataFile, HubData, kind_of, left_aside, locate
from lorakit.data.sources.readers import READERS
from lorakit.errors import DataError


def test_every_known_suffix_has_a_reader():
    assert set(SUFFIXES) == set(READERS)


def test_a_relative_path_is_tried_here_then_in_the_folders(tmp_path, monkeypatch):
    here, recipe = tmp_path / "here", tmp_path / "recipe"
    for folder in (here, recipe):
        folder.mkdir()
        (folder / "both.jsonl").write_text("{}")
    (recipe / "only.jsonl").write_text("{}")
    monkeypatch.chdir(here)
    assert locate("both.jsonl", [recipe]) == [DataFile("both.jsonl", "both.jsonl", ".jsonl")]
    assert locate("only.jsonl", [recipe])[0].path == str(recipe / "only.jsonl")


def test_a_folder_gives_its_files_in_order_without_what_describes_them(tmp_path):
    for name in ("b.jsonl", "a/z.csv", "a/c.txt.gz", "README.md", ".hidden.jsonl", "x.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [f.name for f in locate(str(tmp_path))] == ["b.jsonl", "a/c.txt.gz", "a/z.csv"]


def test_a_folder_without_usable_files_lists_what_it_holds(tmp_path):
    (tmp_path / "weights.bin").write_text("x")
    with pytest.raises(DataError, match=r"no file of a known kind .*weights.bin"):
        locate(str(tmp_path))


def test_a_glob_gives_the_files_it_matches(tmp_path):
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    assert [f.name for f in locate(str(tmp_path / "a*.jsonl"))] == ["a1.jsonl", "a2.jsonl"]


def test_a_folder_with_brackets_in_its_name_is_no_pattern(tmp_path):
    folder = tmp_path / "my data [v2]"
    folder.mkdir()
    (folder / "a1.jsonl").write_text("{}")
    assert [f.name for f in locate(str(folder / "a*.jsonl"))] == ["a1.jsonl"]
    assert [f.name for f in locate(str(tmp_path / "my data *" / "a[0-9].jsonl"))] == ["a1.jsonl"]


def test_a_misspelt_file_is_suggested(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"no such file") as caught:
        locate(str(tmp_path / "trian.jsonl"))
    assert caught.value.hint == "did you mean train.jsonl?"


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    os.symlink(tmp_path / "loop.jsonl", tmp_path / "loop.jsonl")
    with pytest.raises(DataError, match="a broken link"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("user/name", HubData("user/name")),
        ("user/name:test", HubData("user/name", None, "test")),
        ("user/name:main:train[:10%]", HubData("user/name", "main", "train[:10%]")),
        ("user/name:train[10:20]", HubData("user/name", None, "train[10:20]")),
    ],
)
def test_hub_ids_are_read_with_config_and_split(source, expected):
    assert locate(source) == expected


def test_what_exists_here_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "name").mkdir()
    (tmp_path / "user" / "name" / "a.jsonl").write_text("{}")
    assert [f.name for f in locate("user/name")] == ["a.jsonl"]


@pytest.mark.parametrize("source", ["", " ", "a\0b", "x" * 5000, "no/such.jsonl", "a/b/c", "~~"])
def test_strange_sources_are_data_errors(source, tmp_path):
    with pytest.raises(DataError):
        locate(source, [tmp_path])


def test_kinds_look_through_gz_and_case():
    assert kind_of("A.JSONL.GZ") == ".jsonl"
    assert kind_of("https://host/a.csv?download=1") == ".csv"
    assert kind_of("model.safetensors") is None


def test_links_out_of_a_folder_are_refused_and_loops_end(tmp_path):
    inside, outside = tmp_path / "data", tmp_path / "outside.jsonl"
    inside.mkdir()
    outside.write_text("{}")
    (inside / "a.jsonl").write_text("{}")
    (inside / "loop").symlink_to(inside, target_is_directory=True)
    (inside / "same.jsonl").symlink_to(inside / "a.jsonl")
    assert [f.name for f in locate(str(inside))] == ["a.jsonl", "same.jsonl"]
    (inside / "b.jsonl").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of the folder"):
        locate(str(inside))
    (inside / "b.jsonl").unlink()
    (inside / "b.jsonl").symlink_to("b.jsonl")
    with pytest.raises(DataError, match="broken link"):
        locate(str(inside))


def test_the_hubs_own_links_between_snapshots_and_blobs_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "1234").write_text("{}")
    (tmp_path / "snapshots" / "main").mkdir(parents=True)
    (tmp_path / "snapshots" / "main" / "a.jsonl").symlink_to("../../blobs/1234")
    assert [f.name for f in locate(str(tmp_path / "snapshots" / "main"))] == ["a.jsonl"]


def test_files_that_are_left_aside_are_known(tmp_path):
    for name in ("a.jsonl", "README.md", "notes.docx", ".hidden", "LICENSE"):
        (tmp_path / name).write_text("{}")
    assert left_aside(str(tmp_path)) == [("notes.docx", "file of another kind")]
    assert left_aside(str(tmp_path / "a.jsonl")) == []


def test_only_the_train_split_of_a_folder_is_read(tmp_path):
    for name in ("train.jsonl", "dev.jsonl", "latest.jsonl", "test/a.csv", "sample_submission.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [f.name for f in locate(str(tmp_path))] == ["latest.jsonl", "train.jsonl"]
    assert dict(left_aside(str(tmp_path))) == {
        "dev.jsonl": "file of the validation split",
        "test/a.csv": "file of the test split",
        "sample_submission.csv": "file of another kind",
    }
    assert [f.name for f in locate(str(tmp_path / "test"))] == ["a.csv"]
