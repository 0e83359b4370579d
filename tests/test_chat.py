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

from lorakit.chat import ChatSession, run
from lorakit.data.prepare import prepare
from lorakit.generate import GenerationSettings
from lorakit.model.several import Several
from lorakit.recipe import Recipe

SETTINGS = GenerationSettings(max_new_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def loaded(finish):
    return Several.of(finish().run)


@pytest.fixture
def session(loaded):
    return ChatSession(loaded, None, SETTINGS)


def say(session, line):
    return "".join(session.handle(line))


def test_questions_and_answers_alternate(session):
    answer = say(session, "What color is box 3?")
    say(session, "And box 4?")
    assert [m.role for m in session.turns] == ["user", "assistant", "user", "assistant"]
    assert session.turns[1].content == answer.strip()
    assert say(session, "   ") == ""
    assert len(session.turns) == 4


def test_undo_retry_and_base_keep_the_conversation_right(session):
    for command in ("/undo", "/retry", "/base"):
        assert say(session, command)
        assert session.turns == []
    first = say(session, "What color is box 3?")
    assert say(session, "/retry") == first
    assert len(session.turns) == 2
    base = say(session, "/base")
    assert base
    assert base != first
    assert len(session.turns) == 2
    assert say(session, "/undo") == "taken back; 0 questions left"
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


def test_adapters_are_listed_loaded_and_switched(finish, tmp_path):
    import shutil

    session = ChatSession(Several.of(finish().run), None, SETTINGS)
    other = tmp_path / "other"
    shutil.copytree(finish(seed=7, learning_rate=1e-2).run.path, other)
    assert say(session, "/adapter") == "tiny-lora (active)"
    first = say(session, "What color is box 3?")
    assert say(session, f"/adapter {other}") == "tiny-lora, other (active)"
    assert say(session, "/retry") != first
    assert "did you mean tiny-lora" in say(session, "/adapter tiny-lore")
    assert "(qlora), not on" in say(session, f"/adapter {finish('qlora').run.path}")
    assert say(session, "/adapter tiny-lora") == "tiny-lora (active), other"
    assert say(session, "/retry") == first


def test_saved_conversations_can_be_trained_on(session, tmp_path):
    path = tmp_path / "talk.jsonl"
    assert "nothing to save" in say(session, f"/save {path}")
    say(session, "What color is box 3?")
    assert "give a name that ends in .jsonl" in say(session, "/save talk.txt")
    assert "cannot be written" in say(session, f"/save {tmp_path}/none/talk.jsonl")
    for _ in range(3):
        assert "added to" in say(session, f"/save {path}")
    assert len(path.read_text().splitlines()) == 3
    recipe = Recipe(model="m", data=str(path), val_size=0)
    assert len(prepare(recipe, session.tokenizer).train) == 3


def test_a_stopped_answer_is_kept_as_far_as_it_came(loaded):
    long = GenerationSettings(max_new_tokens=200, temperature=0.0)
    session = ChatSession(loaded, None, long)
    answer = session.handle("What color is box 3?")
    said = next(answer)
    while not said.strip():
        said += next(answer)
    answer.close()
    assert [m.role for m in session.turns] == ["user", "assistant"]
    assert session.turns[1].content == said.strip()


def test_a_pipe_gets_answers_only(loaded):
    out = io.StringIO()
    lines = io.StringIO("What color is box 3?\n\nAnd box 4?\n/quit\nnever asked\n")
    code = run(
        loaded,
        title="T",
        system=None,
        settings=SETTINGS,
        stdin=lines,
        stdout=out,
    )
    assert code == 0
    assert "T" not in out.getvalue().splitlines()[0] or ">" not in out.getvalue()
    assert "never asked" not in out.getvalue()


def test_json_gives_one_object_an_answer(loaded):
    out = io.StringIO()
    run(
        loaded,
        title="T",
        system=None,
        settings=SETTINGS,
        as_json=True,
        question="What color is box 3?",
        stdout=out,
    )
    row = json.loads(out.getvalue())
    assert row["question"] == "What color is box 3?"
    assert row["answer"]


def _read_until(terminal, text, seconds=60):
    seen, deadline = "", time.monotonic() + seconds
    while text not in seen and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 4096).decode(errors="replace")
    assert text in seen, seen
    return seen


def test_ctrl_c_in_a_real_terminal_stops_the_answer_not_the_chat(finish):
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "lorakit", "chat", str(finish().run.path)]
    process = subprocess.Popen(
        # More than the tiny model writes in any time: the answer must not end before the signal.
        [*command, "--max-new-tokens", "100000", "--temperature", "0"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        assert "/help lists the commands" in _read_until(mine, "> ")
        question = b"What color is box 3?\n"
        os.write(mine, question)
        seen = ""
        while len(seen) < len(question) + 20:  # the echo, and the beginning of an answer
            seen += os.read(mine, 4096).decode(errors="replace")
        process.send_signal(signal.SIGINT)
        assert "[stopped]" in _read_until(mine, "> ")
        os.write(mine, b"/undo\n")
        seen = _read_until(mine, "taken back").partition("taken back")[2]
        # Before the prompt stands the terminal is not yet readline's: Ctrl-D would be lost.
        assert "> " in seen or _read_until(mine, "> ")
        os.write(mine, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(mine)
