"""A chat keeps its conversation right through commands, stops, pipes and a real terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest
from tests.made_runs import WORDS, answer

from lorakit.data.prepare import prepare_data
from lorakit.errors import DataError
from lorakit.inference.chat import ChatSession, run
from lorakit.inference.generate import GenerationSettings
from lorakit.model.multi_adapter import MultiAdapterModel
from lorakit.recipe.schema import Recipe

SETTINGS = GenerationSettings(max_new_tokens=6, temperature=0.0)
# More than is written in any time: such an answer ends where it is stopped.
ENDLESS = GenerationSettings(max_new_tokens=100_000, temperature=0.0)


ASK = "What color is box 3?"


@pytest.fixture(scope="module")
def loaded(speaker):
    return MultiAdapterModel.of(speaker("fruit"))


@pytest.fixture
def session(loaded):
    return ChatSession(loaded, None, SETTINGS)


def say(session, line):
    return "".join(session.handle(line))


def test_questions_and_answers_alternate(session):
    first = say(session, ASK)
    assert first.strip() == answer("fruit", 3, 6)
    second = say(session, "And the next?")
    assert [m.role for m in session.turns] == ["user", "assistant", "user", "assistant"]
    assert [m.content for m in session.turns[1::2]] == [first.strip(), second.strip()]
    assert say(session, "   ") == ""
    assert len(session.turns) == 4


def test_undo_retry_and_base_keep_the_conversation_right(session):
    for command in ("/undo", "/retry", "/base"):
        assert say(session, command)
        assert session.turns == []
    first = say(session, ASK)
    assert say(session, "/retry") == first
    assert len(session.turns) == 2
    assert say(session, "/base").strip() == answer("base", 3, 6)
    assert len(session.turns) == 2
    assert session.turns[1].content == first.strip()
    assert say(session, "/undo") == "removed; 0 questions left"
    assert session.turns == []


def test_system_and_settings(session):
    assert say(session, "/system") == "system: (none)"
    say(session, "/system Be brief.")
    assert session.messages[0].content == "Be brief."
    assert say(session, "/system none") == "system: (none)"
    assert say(session, "/set temperature=0.2") == "temperature=0.2"
    assert session.settings.temperature == 0.2
    assert "did you mean temperature" in say(session, "/set temprature=1")
    assert "takes a number" in say(session, "/set top_p=high")
    assert "between 1 and" in say(session, "/set max_new_tokens=0")
    assert "max_new_tokens=6" in say(session, "/set")


def test_unknown_commands_suggest_and_help_lists(session):
    assert "did you mean /undo?" in say(session, "/unod")
    text = say(session, "/help")
    for command in ("/base", "/system", "/undo", "/retry", "/save", "/set", "/adapter", "/quit"):
        assert command in text
    say(session, "/quit")
    assert session.ended


def test_adapters_are_listed_loaded_and_switched(speaker):
    session = ChatSession(MultiAdapterModel.of(speaker("fruit")), None, SETTINGS)
    assert say(session, "/adapter") == "fruit (active)"
    first = say(session, ASK)
    other = speaker("animal", method="qlora")
    assert "(qlora), not on" in say(session, f"/adapter {other.path}")
    assert say(session, f"/adapter {speaker('animal').path}") == "fruit, animal (active)"
    assert say(session, "/retry").strip() == answer("animal", 3, 6)
    assert "did you mean fruit" in say(session, "/adapter fruits")
    assert say(session, "/adapter fruit") == "fruit (active), animal"
    assert say(session, "/retry") == first


def test_saved_conversations_can_be_trained_on(session, tmp_path):
    path = tmp_path / "talk.jsonl"
    assert "nothing to save" in say(session, f"/save {path}")
    say(session, ASK)
    assert "expected a name that ends in .jsonl" in say(session, "/save talk.txt")
    assert "cannot be written" in say(session, f"/save {tmp_path}/none/talk.jsonl")
    for _ in range(3):
        assert "added to" in say(session, f"/save {path}")
    assert len(path.read_text().splitlines()) == 3
    recipe = Recipe(model="m", data=str(path), val_size=0)
    assert len(prepare_data(recipe, session.tokenizer).train) == 3


def test_a_stopped_answer_is_kept_as_far_as_it_came(loaded):
    session = ChatSession(loaded, None, ENDLESS)
    pieces = session.handle(ASK)
    said = "".join(next(pieces) for _ in range(3))
    pieces.close()
    assert said.strip() == answer("fruit", 3, len(said.split()))
    assert [m.role for m in session.turns] == ["user", "assistant"]
    assert session.turns[1].content == said.strip()


def test_a_pipe_gets_answers_only(loaded):
    out = io.StringIO()
    lines = io.StringIO(f"{ASK}\n\nAnd the next?\n/quit\nnever asked\n")
    code = run(
        loaded,
        title="T",
        system=None,
        settings=SETTINGS,
        stdin=lines,
        stdout=out,
    )
    assert code == 0
    said = [line.split() for line in out.getvalue().splitlines()]
    assert said[0] == answer("fruit", 3, 6).split()
    assert [len(words) for words in said] == [6, 6]
    assert set(said[1]) <= set(WORDS["fruit"])


@pytest.fixture
def short_context(loaded, monkeypatch):
    """A model whose context holds 64 tokens."""
    monkeypatch.setattr(
        loaded.model.config.get_text_config(), "max_position_embeddings", 64, raising=True
    )
    return loaded


LONG = "What is blue? " * 40


@pytest.mark.parametrize("as_json", [True, False])
def test_one_question_over_the_context_is_an_error_of_the_command(short_context, as_json):
    stdout = io.StringIO()
    with pytest.raises(DataError, match="context is 64") as caught:
        run(
            short_context,
            title="",
            system=None,
            settings=GenerationSettings(max_new_tokens=4),
            question=LONG,
            as_json=as_json,
            stdout=stdout,
        )
    assert caught.value.exit_code == 2
    assert stdout.getvalue() == ""


def test_a_pipe_goes_on_after_a_question_over_the_context_and_ends_with_2(short_context):
    stdout = io.StringIO()
    code = run(
        short_context,
        title="",
        system=None,
        settings=GenerationSettings(max_new_tokens=4),
        as_json=True,
        stdin=io.StringIO(f"{LONG}\nShort?\n"),
        stdout=stdout,
    )
    rows = [json.loads(line) for line in stdout.getvalue().splitlines()]
    assert [list(row) for row in rows] == [["question", "error"], ["question", "answer"]]
    assert code == 2


def test_base_over_the_context_does_not_end_the_chat(session, monkeypatch):
    "".join(session.handle("Which color?"))
    config = session.model.config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", 8)
    assert "context is 8" in "".join(session.handle("/base"))


@pytest.mark.parametrize("as_json", [True, False])
def test_leaving_by_a_pipe_is_no_answer(loaded, as_json):
    out, lines = io.StringIO(), io.StringIO("/quit\n")
    run(loaded, title="T", system=None, settings=SETTINGS, as_json=as_json, stdin=lines, stdout=out)
    assert out.getvalue() == ""


def test_json_gives_one_object_an_answer(loaded):
    out = io.StringIO()
    run(
        loaded,
        title="T",
        system=None,
        settings=SETTINGS,
        as_json=True,
        question=ASK,
        stdout=out,
    )
    assert json.loads(out.getvalue()) == {"question": ASK, "answer": answer("fruit", 3, 6)}


def _read_until(terminal, text, seconds=300):
    """All that the terminal shows until `text` is there; a process that ended ends the wait."""
    seen, deadline = "", time.monotonic() + seconds
    while text not in seen and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # nobody has the other side open any more
                break
    assert text in seen, seen
    return seen


def test_ctrl_c_in_a_real_terminal_stops_the_answer_not_the_chat(speaker):
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "lorakit", "chat", str(speaker("fruit").path)]
    process = subprocess.Popen(
        [*command, "--max-new-tokens", str(ENDLESS.max_new_tokens), "--temperature", "0"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        assert "/help lists the commands" in _read_until(mine, "> ")
        os.write(mine, f"{ASK}\n".encode())
        _read_until(mine, answer("fruit", 3, 4))  # the answer is under way, and has no end
        process.send_signal(signal.SIGINT)
        assert "[stopped]" in _read_until(mine, "> ")
        os.write(mine, b"/undo\n")
        seen = _read_until(mine, "removed").partition("removed")[2]
        # Before the prompt stands the terminal is not yet readline's: Ctrl-D would be lost.
        assert "> " in seen or _read_until(mine, "> ")
        os.write(mine, b"\x04")
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        os.close(mine)
