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


def test_commands_on_a_folder_that_is_no_run(lorakit, tmp_path):
    for command in ("eval", "chat", "export", "serve"):
        code, _, err = lorakit(command, tmp_path)
        assert code == 2
        assert "not a lorakit run" in err
        code, _, err = lorakit(command, tmp_path / "none")
        assert "no such run directory" in err
