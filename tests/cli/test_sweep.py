"""`lorakit sweep`: its plan, its runs, its resume, and one clear error for bad input."""

import json

import pytest

SMALL = ["max_steps=2", "cutoff_len=64", "val_size=3", "lora_r=4", "dtype=float32"]


@pytest.fixture
def words(tiny_model_dir, tiny_data):
    given = ["sweep", "--model", tiny_model_dir, "--data", tiny_data, "--output", "s", *SMALL]
    return [*given, "--offline"]


def test_a_sweep_is_planned_trained_and_resumed(lorakit, words, tmp_path):
    vary = ["--vary", "learning_rate=1e-5,2e-2", "--halving"]
    code, out, err = lorakit(*words, *vary, "--plan")
    assert code == 0, err
    assert "runs     2, one after the other on one base; 3 steps in all instead of 4" in out
    assert not (tmp_path / "s").exists()
    code, out, err = lorakit(*words, *vary, "--plan", "--json")
    assert json.loads(out)["steps"] == 3
    code, out, err = lorakit(*words, *vary)
    assert code == 0, err
    assert "best     2-learning_rate_0.02 *" in out
    assert "Stopped by the sweep at step 1 of 2" in out
    assert "lorakit chat s/2-learning_rate_0.02" in " ".join(out.split())
    code, out, _ = lorakit("sweep", "s", "--resume", "--json")
    assert code == 0
    values = json.loads(out)
    assert values["best"] == "s/2-learning_rate_0.02"
    assert [run["state"] for run in values["runs"]] == ["stopped", "finished"]
    code, _, err = lorakit(*words, *vary)
    assert code == 2
    assert "already holds a sweep" in err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--vary", "lerning_rate=1"], "unknown key; did you mean learning_rate?"),
        (["--vary", "learning_rate=2"], "learning_rate=2: input should be less than 1"),
        (["--vary", "lora_r=8,8"], "lora_r: 8 is given twice"),
        (["--vary", "model=a,b"], "model cannot vary"),
        (["--vary", "lora_r"], "expected key=value,value"),
        (["--vary", "lora_r=4..8"], "a range is searched"),
        ([], "needs settings to vary"),
        (["--resume"], "cannot be changed"),
    ],
)
def test_bad_input_is_one_clear_error(lorakit, words, tmp_path, more, said):
    code, out, err = lorakit(*words, *more)
    assert code == 2
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "s").exists()


def test_a_resume_needs_the_folder_of_a_sweep(lorakit, tmp_path):
    (tmp_path / "folder").mkdir()
    code, _, err = lorakit("sweep", "folder", "--resume")
    assert (code, "holds no sweep" in err) == (2, True)
    code, _, err = lorakit("sweep", "--resume")
    assert (code, "needs the folder of a sweep" in err) == (2, True)
