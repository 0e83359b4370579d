"""Names are found in the text of task files, in each form in which they are written."""

from lorakit.evaluation.harness_index import mentioned, names_in, task_folders


def test_forms_of_names():
    text = """\
tag:
  - math_word_problems
  - "quoted"
group: top
task: 'one' # a comment
dataset_path: x
"""
    assert names_in(text) == ["math_word_problems", "quoted", "top", "one"]
    assert names_in("task: [a, 'b',c]\nother: task: no\n") == ["a", "b", "c"]
    assert names_in("task:\n- a\n- b\nmetric: c\n") == ["a", "b"]
    assert names_in('"task": "a"\n"dataset": "b"\n') == ["a"]
    assert names_in("  task: indented\n") == []


def test_folders_by_name_and_what_a_users_files_mention(tmp_path):
    for place, text in {
        "one/a.yaml": "task: a",
        "one/deep/_b": "task: b",
        "two/c.yaml": "group: g\ntask: [a, b]",
    }.items():
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = task_folders(tmp_path)
    assert found["b"] == {tmp_path / "one", tmp_path / "two"}
    assert found["g"] == {tmp_path / "two"}
    assert mentioned([tmp_path / "two"]) == {"a", "b", "g"}
