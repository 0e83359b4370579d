"""What one does with a run: JSON on stdout, one clear error for a folder that is none."""

import json


def test_eval_and_export_print_one_json_object(lorakit, finish):
    run = finish(seed=3).run.path
    code, out, _ = lorakit("eval", run, "--json", "--samples", 1)
    value = json.loads(out)
    assert code == 0
    assert set(value) >= {"base", "tuned"}
    assert set(value["tuned"]) == {"loss", "perplexity", "tokens"}
    code, out, _ = lorakit("export", run, "--to", "merged", "--json")
    assert code == 0
    assert json.loads(out)["kl_per_token"] < 1e-3


def test_report_prints_where_it_lies_and_needs_no_adapter(lorakit, finish, tmp_path):
    run = finish(seed=3).run
    code, out, _ = lorakit("report", run.path)
    assert (code, out.strip()) == (0, str(run.report))
    code, out, _ = lorakit("report", run.path, "--output", tmp_path / "r.html", "--json")
    assert json.loads(out) == {"report": str(tmp_path / "r.html")}
    assert (tmp_path / "r.html").read_text() == run.report.read_text()
    (tmp_path / "recipe.yaml").write_text(run.recipe.read_text())
    code, _, _ = lorakit("report", tmp_path)
    assert code == 0
    assert "No step was finished." in (tmp_path / "report.html").read_text()


def test_commands_on_a_folder_that_is_no_run(lorakit, tmp_path):
    for command in ("eval", "chat", "export", "serve", "report"):
        code, _, err = lorakit(command, tmp_path)
        assert code == 2
        assert "not a lorakit run" in err
        code, _, err = lorakit(command, tmp_path / "none")
        assert "no such run directory" in err


def test_eval_scores_tasks_and_names_what_it_could_not(lorakit, finish, tiny_data):
    run = finish(seed=3).run.path
    words = ("eval", run, "--samples", 0, "--tasks", f"{tiny_data}:3", "--max-new-tokens", 3)
    code, out, _ = lorakit(*words, "--metric", "contains", "--no-general", "--json")
    value = json.loads(out)
    assert code == 0
    assert [(s["task"], s["metric"], s["rows"]) for s in value["tasks"]] == [
        ("colors", "contains", 3)
    ]
    assert value["failed"] == {}
    code, _, err = lorakit(*words, "--metric", "exactly")
    assert code == 2
    assert "'exactly' is unknown" in err
    code, _, err = lorakit("eval", run, "--judge", "http://127.0.0.1:9/v1")
    assert code == 2
    assert "--judge-model is missing" in err


def test_compare_prints_a_table_or_json_and_writes_a_page(lorakit, finish, tmp_path):
    one, two = finish(seed=3).run.path, finish(seed=11).run.path
    code, out, err = lorakit("compare", one, two, "--output", tmp_path / "c.html", "--json")
    assert code == 0
    assert json.loads(out)["runs"][0]["settings"]["seed"] == "3"
    assert "Settings that differ" in (tmp_path / "c.html").read_text()
    assert "c.html" in err
    code, out, _ = lorakit("compare", one, two)
    assert "settings that differ" in out
    code, _, err = lorakit("compare", one)
    assert code == 2
    assert "expected two or more" in err
