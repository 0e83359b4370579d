"""The official `openai` client talks to `lorakit serve` as to any server of that kind."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from tests.made_runs import LIMIT, answer

from lorakit.data.tokenize.encode import prompt_ids
from lorakit.types import Message

SPEAKERS = ["fruit", "animal"]
ASK = [{"role": "user", "content": "What color is box 3?"}]


@pytest.fixture(scope="module")
def runs(speaker):
    """Two runs on one base; models are named by their folders."""
    return [speaker(name) for name in SPEAKERS]


@contextlib.contextmanager
def serving(runs, folder):
    """(process, address) of a running `lorakit serve` with these adapters and a key."""
    (folder / "key").write_text("secret\n")
    words = ["serve", *(str(r.path) for r in runs), "--port", "0", "--engine", "embedded"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", *words, "--api-key-file", str(folder / "key")],
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            found = re.search(r"(http://127\.0\.0\.1:\d+/v1)", line)
            if found:
                break
        else:
            pytest.fail("".join(lines))
        yield process, found.group(1)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def server(runs, tmp_path_factory):
    """One with two adapters, for all tests that leave it as it is."""
    with serving(runs, tmp_path_factory.mktemp("serve")) as running:
        yield running


def client_of(server, key="secret"):
    return openai.OpenAI(base_url=server[1], api_key=key, max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def client(server):
    return client_of(server)


def ask(client, **values):
    values = {"model": "", "messages": ASK, "max_tokens": 8, "temperature": 0, **values}
    return client.chat.completions.create(**values)


def said(client, **values):
    """The text of one answer."""
    return ask(client, **values).choices[0].message.content.strip()


def endless(client):
    """A stream that is under way, and ends in no test's time."""
    stream = ask(client, stream=True, max_tokens=10**6)
    next(piece for piece in stream if piece.choices[0].delta.content)
    return stream


def test_models_are_the_adapters_and_the_base(client, runs):
    found = [m.id for m in client.models.list()]
    assert found[:2] == [r.path.name for r in runs]
    assert len(found) == 3


def test_each_adapter_and_the_base_answer_as_they_do_in_chat(client, tokenizer):
    """`tests/inference/test_chat.py` has the same words from the same models."""
    names = [m.id for m in client.models.list()]
    for name, words in zip(names, [*SPEAKERS, "base"], strict=True):
        reply = ask(client, model=name)
        assert reply.choices[0].message.content.strip() == answer(words, 3, 8)
        assert reply.choices[0].finish_reason == "length"
        assert reply.model == name
        asked = [Message("user", ASK[0]["content"])]
        assert reply.usage.prompt_tokens == len(prompt_ids(tokenizer, asked))
        assert reply.usage.completion_tokens == 8


def test_a_stream_gives_the_same_answer_in_pieces(client):
    events = list(ask(client, stream=True, stream_options={"include_usage": True}))
    pieces = [e.choices[0].delta.content or "" for e in events if e.choices]
    assert "".join(pieces).strip() == answer("fruit", 3, 8)
    assert len([p for p in pieces if p]) == 8
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert events[-1].usage.completion_tokens == 8


def test_stop_texts_and_lengths_end_an_answer(client):
    text = f" {answer('fruit', 3, 24)}"
    for stop in ("pear", "ach pe", " "):  # a word, two parts of words, the very first character
        short = ask(client, max_tokens=24, stop=[stop]).choices[0]
        assert short.message.content == text[: text.index(stop)], stop
        assert short.finish_reason == "stop"
    assert ask(client, max_tokens=1).choices[0].finish_reason == "length"


def test_a_seed_repeats_a_drawn_answer(client):
    """Without a digit in the question each of ten words is as likely to be the first."""
    values = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 2}
    drawn = [said(client, temperature=1, seed=5, **values) for _ in range(6)]
    assert len(set(drawn)) == 1
    assert len({said(client, temperature=1, seed=seed, **values) for seed in range(6)}) > 1


def test_faults_come_in_openais_form(client, server):
    with pytest.raises(openai.NotFoundError, match="there is: "):
        ask(client, model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="temperature: takes a number"):
        ask(client, temperature=7)
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\]: role"):
        ask(client, messages=[{"role": "pirate", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match=f"this model reads {LIMIT}") as caught:
        ask(client, messages=[{"role": "user", "content": "word " * (LIMIT + 1)}])
    assert caught.value.code == "context_length_exceeded"
    headers = {"authorization": "Bearer secret"}
    reply = httpx2.post(f"{server[1]}/chat/completions", content=b"{", headers=headers, timeout=300)
    assert reply.status_code == 400
    assert "not valid JSON" in reply.json()["error"]["message"]
    reply = httpx2.get(f"{server[1]}/nothing", headers=headers, timeout=300)
    assert reply.status_code == 404
    assert "/v1/chat/completions" in reply.json()["error"]["message"]


def test_pages_elsewhere_huge_bodies_and_half_characters_are_turned_away(client, server):
    address, headers = f"{server[1]}/chat/completions", {"authorization": "Bearer secret"}
    good = {"messages": ASK, "max_tokens": 2, "temperature": 0}

    def status(more=(), **values):
        reply = httpx2.post(address, headers={**headers, **dict(more)}, timeout=300, **values)
        return reply.status_code, set(reply.json()["error"])

    shape = {"message", "type", "param", "code"}
    assert status({"host": "evil.example"}, json=good) == (403, shape)
    assert status({"origin": "https://evil.example"}, json=good) == (403, shape)
    assert status({"origin": "null"}, json=good) == (403, shape)
    assert status(content=b" " * 100_000_000) == (413, shape)
    assert status(content=(b" " * 2**20 for _ in range(8))) == (413, shape)
    assert status(content=b"[" * 100_000) == (400, shape)
    assert status(content=b'{"messages": "\\ud800"}') == (400, shape)
    assert status(content=b"\xff\xfe") == (400, shape)
    assert status(json={**good, "chat_template": "{{ 10**100000000 }}"}) == (400, shape)
    assert status(json={**good, "max_tokens": 10**9}) == (400, shape)
    assert status(json={**good, "messages": [{"role": ["user"], "content": "a"}]}) == (400, shape)
    reply = httpx2.get(address, headers=headers, timeout=300)
    assert (reply.status_code, set(reply.json()["error"])) == (404, shape)
    origin = {"origin": "http://localhost:1"}
    reply = httpx2.post(address, json=good, headers={**headers, **origin}, timeout=300)
    assert reply.status_code == 200


def test_a_wrong_key_opens_nothing_but_health(server):
    wrong = client_of(server, "wrong")
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with pytest.raises(openai.AuthenticationError):
        ask(wrong)
    reply = httpx2.get(server[1].replace("/v1", "/health"), timeout=300)
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})


def test_twenty_requests_at_once_all_get_their_own_answer(client):
    def one(number):
        messages = [{"role": "user", "content": f"What color is box {number % 10}?"}]
        return said(client, messages=messages, model=SPEAKERS[number // 10])

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(one, range(20)))
    assert together == [answer(name, digit, 8) for name in SPEAKERS for digit in range(10)]


def test_a_reader_who_leaves_frees_the_model(client):
    """Nothing else would: the answer has no end, and the next waits for it."""
    endless(client).close()
    assert said(client, max_tokens=2) == answer("fruit", 3, 2)


def test_a_taken_port_is_said_before_the_model_is_loaded(server, runs):
    port = server[1].split(":")[2].split("/")[0]
    words = ["serve", str(runs[0].path), "--port", port, "--engine", "embedded"]
    done = subprocess.run([sys.executable, "-m", "lorakit", *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "hint: another program has it" in done.stderr


def test_ctrl_c_in_the_middle_of_an_answer_stops_cleanly(runs, tmp_path):
    with serving(runs[:1], tmp_path) as (process, address):
        stream = endless(client_of((process, address)))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) in (0, 130)
        rest = process.stderr.read()
        stream.close()
    assert "Traceback" not in rest, rest
    assert "stopped" in rest
    host, port = address.split("/")[2].split(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0
