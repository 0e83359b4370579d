"""Chat side by side: what is asked of which model, and votes that can be trained on."""

import json

import pytest
from pydantic import ValidationError

from lorakit.errors import LorakitError
from lorakit.web.arena import Dialog, Sampling, Vote, preference_rows

ASKED = [{"role": "user", "content": "What color?"}]


@pytest.fixture
def asked(client, monkeypatch):
    found, worker = [], client.app.app.state.context.chat

    async def stream(do, **values):
        found.append((do, values))
        yield "It is "
        if values["settings"]["seed"] == 13:
            raise LorakitError("out of memory", "ask something shorter")
        yield "red."

    async def start():
        pass

    monkeypatch.setattr(worker, "stream", stream)
    monkeypatch.setattr(worker, "start", start)
    return found


def test_the_page_has_a_column_for_base_and_each_run(client, asked):
    assert "runs/half" not in client.get("/chat").text  # it has no adapter
    text = client.get("/chat?run=runs/good&run=nothing").text
    assert 'data-column="base"' in text
    assert 'data-column="runs/good"' in text


def test_an_answer_streams(client, asked, folder):
    body = {"runs": ["runs/good"], "column": "runs/good", "messages": ASKED}
    answer = client.post("/answer", json=body)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert lines == [{"piece": "It is "}, {"piece": "red."}, {"done": True}]
    path = str(folder / "runs" / "good")
    ((_, values),) = asked
    assert (values["runs"], values["run"], values["messages"]) == ([path], path, ASKED)
    client.post("/answer", json={**body, "column": "base"})
    assert asked[1][1]["run"] is None
    assert asked[1][1]["settings"] == values["settings"]  # the same sampling for all


def test_a_fault_of_the_model_is_a_line_of_the_answer(client, asked):
    body = {"runs": ["runs/good"], "column": "base", "messages": ASKED, "settings": {"seed": 13}}
    last = json.loads(client.post("/answer", json=body).text.splitlines()[-1])
    assert last == {"error": "out of memory: ask something shorter."}


@pytest.mark.parametrize(
    "body",
    [
        [], {}, {"runs": "runs/good"}, {"runs": []}, {"runs": ["a", "b", "c", "d"]},
        {"runs": ["../x"], "column": "base"}, {"runs": ["runs/half"], "column": "base"},
        {"runs": ["runs/good"], "column": "runs/half", "messages": ASKED},
        {"runs": ["runs/good"], "column": "base", "messages": []},
        {"runs": ["runs/good"], "column": "base", "messages": ASKED,
         "settings": {"top_p": 2}},
    ],
)  # fmt: skip
def test_other_requests_are_refused(client, asked, body):
    answer = client.post("/answer", json=body)
    assert answer.status_code == 400
    assert 'class="fault"' in answer.text
    assert not asked


def test_messages_are_turns_that_end_with_a_question():
    answer = {"role": "assistant", "content": "red"}
    made = Dialog(messages=[*ASKED, answer, *ASKED])
    assert [turn.role for turn in made.messages] == ["user", "assistant", "user"]
    for bad in (None, [], [answer], [*ASKED, answer], [{"role": "system", "content": "x"}],
                ["x"], [{"role": "user"}], ASKED * 201,
                [{"role": "user", "content": "x" * 10**6}]):  # fmt: skip
        with pytest.raises(ValidationError):
            Dialog(messages=bad)


def test_sampling_has_bounds():
    assert Sampling().temperature == 0.7
    assert Sampling(seed=5.0).seed == 5
    for bad in ({"temperature": -1}, {"seed": "x"}, {"top_p": 2}, {"top_p": float("nan")}):
        with pytest.raises(ValidationError):
            Sampling(**bad)


def test_votes_are_preference_data(client, folder):
    answers = {"base": "a rock", "runs/good": "a lamp ", "runs/other": "a cat"}
    body = {"messages": ASKED, "answers": answers, "winner": "runs/good", "system": "Be brief."}
    assert client.post("/vote", json=body).json() == {"said": "saved: 2 rows in preferences.jsonl"}
    rows = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    head = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert [row["chosen"] for row in rows] == [
        [*head, {"role": "assistant", "content": "a lamp"}]
    ] * 2
    assert [row["rejected"][-1]["content"] for row in rows] == ["a rock", "a cat"]
    assert client.post("/vote", json=body).json()["said"].startswith("saved: 4 rows")


def test_votes_can_be_trained_on(folder, tokenizer):
    """By TRL as they are, and by lorakit with the column of the chosen conversations named."""
    from trl.data_utils import is_conversational, maybe_extract_prompt

    from lorakit.data.prepare import prepare_data
    from lorakit.recipe.loader import load_recipe

    answers = {"base": "a rock", "runs/good": "a lamp"}
    rows = preference_rows(Vote(messages=ASKED, answers=answers, winner="runs/good"))
    assert is_conversational(rows[0])
    split = maybe_extract_prompt(rows[0])
    assert split["prompt"] == ASKED
    assert split["rejected"] == [{"role": "assistant", "content": "a rock"}]
    path = folder / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    recipe = {"model": "demo", "data": str(path), "columns": {"messages": "chosen"}, "val_size": 0}
    prepared = prepare_data(load_recipe(recipe).recipe, tokenizer, [])
    assert "a lamp" in tokenizer.decode(prepared.train[0].input_ids)


@pytest.mark.parametrize(
    "change",
    [
        {"winner": "nobody"}, {"winner": None}, {"answers": {}}, {"answers": {"base": 5}},
        {"answers": {"base": "same", "x": "same"}, "winner": "x"}, {"messages": None},
        {"answers": {"base": "", "x": "good"}, "winner": "x"},
    ],
)  # fmt: skip
def test_odd_votes_are_refused(client, folder, change):
    body = {"messages": ASKED, "answers": {"base": "a", "x": "b"}, "winner": "x", **change}
    assert client.post("/vote", json=body).status_code == 400
    assert not (folder / "preferences.jsonl").exists()


def test_a_full_disk_and_a_link_out_of_the_folder(client, folder, tmp_path_factory):
    body = {"messages": ASKED, "answers": {"base": "a", "x": "b"}, "winner": "x"}
    path = folder / "preferences.jsonl"
    path.symlink_to("/dev/full")
    assert "link out of the folder" in client.post("/vote", json=body).text
    path.unlink()
    path.mkdir()
    answer = client.post("/vote", json=body)
    assert answer.status_code == 400
    assert "cannot write" in answer.text
