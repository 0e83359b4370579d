"""A run's folder as an object: what was written, questions, exports."""

import xml.etree.ElementTree as ElementTree

import pytest
from tests.made_runs import answer

import lorakit
from lorakit.errors import RunError
from lorakit.run import Run


@pytest.fixture(scope="module")
def run(finish):
    return lorakit.open_run(finish(max_steps=2).run.path)


def test_what_the_run_wrote_is_data(run):
    assert run.finished
    assert (run.adapter / "adapter_config.json").exists()
    assert run.recipe.max_steps == 2
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens"} <= set(run.metrics[-1])
    assert run.evaluation.tuned.tokens > 0
    assert repr(run).startswith(f"<Run {run.path}: trained, step 2, loss ")


def test_a_notebook_gets_the_curve(run, tmp_path):
    root = ElementTree.fromstring(run._repr_svg_())
    assert root.get("width") == "570"
    assert "trained, step 2" in "".join(root.itertext())
    assert Run(tmp_path)._repr_svg_() is None


def test_base_and_tuned_answer_and_the_model_stays(speaker, tiny_data):
    run, ask = lorakit.open_run(speaker("fruit").path), "What color is box 1?"
    greedy = {"temperature": 0, "max_new_tokens": 4}
    assert run.chat(ask, **greedy) == answer("fruit", 1, 4)
    assert run.chat(ask, **greedy, base=True) == answer("base", 1, 4)
    assert run.chat([{"role": "user", "content": ask}], **greedy) == answer("fruit", 1, 4)
    held = run._several
    assert run.evaluate(tiny_data, samples=1).tuned.tokens > 0
    assert run._several is held
    run.close()
    assert run._several is None


def test_a_system_prompt_is_read(speaker):
    run = lorakit.open_run(speaker("fruit").path)
    for digit in (2, 7):
        said = run.chat("Hi", system=f"Box {digit}.", temperature=0, max_new_tokens=8)
        assert said == answer("fruit", digit, 8)


def test_without_data_the_held_out_rows_are_scored(run):
    assert run.evaluate(samples=1).data == "the run's held-out rows"


def test_one_talks_until_quit(run, monkeypatch, capsys):
    lines = iter(["/system Be brief.", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run.chat() is None
    assert "system: Be brief." in capsys.readouterr().out


def test_evaluation_prints_as_the_command_does(run, tiny_data):
    found = run.evaluate(tiny_data, samples=1)
    assert found.tuned.tokens > run.evaluation.tuned.tokens
    assert "perplexity" in repr(found)
    assert len(found.samples) == 1


def test_export_gives_what_the_command_prints(run, tmp_path):
    found = run.export("adapter", tmp_path / "out")
    assert found["path"] == str(tmp_path / "out")
    assert found["kl_per_token"] < 1e-6
    with pytest.raises(RunError, match="exists already"):
        run.export("adapter", tmp_path / "out")


def test_a_folder_without_a_run_and_one_without_an_adapter(tmp_path, tiny_recipe, tiny_model_dir):
    with pytest.raises(RunError, match="no such run directory"):
        lorakit.open_run(tmp_path / "none")
    resolved = tiny_recipe(tiny_model_dir, "d", tmp_path)
    (tmp_path / "recipe.yaml").write_text(resolved.to_yaml())
    stopped = lorakit.open_run(tmp_path)
    assert not stopped.finished
    assert repr(stopped) == f"<Run {tmp_path}: not finished, no step yet>"
    for call in (stopped.evaluate, stopped.export, lambda: stopped.chat("Hi")):
        with pytest.raises(RunError, match="no adapter yet"):
            call()


def test_a_run_is_the_same_by_either_way(run):
    assert Run(str(run.path)).path == run.path
