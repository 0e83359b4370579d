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
