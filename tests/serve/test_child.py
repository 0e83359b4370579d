"""The official `openai` client against the servers that `lorakit serve` really starts."""

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from rich.console import Console
from tests.made_runs import answer, calling_run

from lorakit.export.exporters import export_run

ASK = [{"role": "user", "content": "What color is box 3?"}]
WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}}
TOOLS = [{"type": "function", "function": {**WEATHER, "description": "Tells the weather."}}]


@contextlib.contextmanager
def serving(runs, engine, folder):
    """(process, address, lines said) of a running `lorakit serve` with a key."""
    (folder / "key").write_text("secret\n")
    words = ["serve", *(str(r.path) for r in runs), "--port", "0", "--engine", engine]
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", *words, "--api-key-file", str(folder / "key")],
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = []
    try:
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"(http://127\.0\.0\.1:\d+/v1)", line):
                break
        else:
            pytest.fail("".join(lines))
        yield process, found.group(1), "".join(lines)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0
        rest = process.stderr.read()
        assert "stopped" in rest
        assert "Traceback" not in rest, rest
        with socket.socket() as probe:
            port = int(found.group(1).split(":")[2].split("/")[0])
            assert probe.connect_ex(("127.0.0.1", port)) != 0
    finally:
        process.kill()


@pytest.fixture(scope="session", params=["llama.cpp", "transformers"])
def server(request, speaker, caller_of, tmp_path_factory):
    """One of each kind for all tests; at last Ctrl-C comes in the middle of an answer."""
    second = caller_of("llama.cpp") if request.param == "llama.cpp" else speaker("animal")
    runs = [speaker("fruit"), second]
    if request.param == "llama.cpp" and not (runs[0].export / "gguf").exists():
        # `serve` would write and compare it; it compares the running server anyway.
        export_run(runs[0], "gguf", None, Console(quiet=True), verify=False)
    with serving(runs, request.param, tmp_path_factory.mktemp("serve")) as running:
        yield *running, request.param, runs
        under_way(client_of(running))


@pytest.fixture(scope="session")
def speakers(server):
    """Those of the two models whose answers are words."""
    return ["fruit"] if server[3] == "llama.cpp" else ["fruit", "animal"]


@pytest.fixture(scope="session")
def caller_of(smollm2_tokenizer, tmp_path_factory):
    """`caller_of(engine)`: a run whose every answer is a tool call, for this engine."""
    tokenizer = smollm2_tokenizer

    def build(engine):
        # transformers reads calls of Qwen's form only; llama.cpp asks for a known tokenizer.
        family = {"llama.cpp": "Llama", "transformers": "Qwen2"}[engine]
        run = calling_run(tokenizer, tmp_path_factory.mktemp("caller"), family)
        if engine == "llama.cpp":
            export_run(run, "gguf", None, Console(quiet=True), verify=False)
        return run

    return build


def client_of(server, key="secret"):
    return openai.OpenAI(base_url=server[1], api_key=key, max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def client(server):
    return client_of(server)


def ask(client, **values):
    values = {"model": "fruit", "messages": ASK, "max_tokens": 8, "temperature": 0, **values}
    return client.chat.completions.create(**values)


def under_way(client):
    """A stream that has begun, and has no end but the context's, some 4,000 tokens on."""
    stream = ask(client, stream=True, max_tokens=10**6)
    next(piece for piece in stream if piece.choices[0].delta.content)
    return stream


def said(client, **values):
    """The text of one answer."""
    return ask(client, **values).choices[0].message.content.strip()


def test_it_says_which_run_is_which_model_and_which_keys_count(server):
    models = ", ".join(f"{run.path.name} = {run.path}" for run in server[4])
    assert f"models   {models}" in server[2]
    for run in server[4]:
        line = rf"^keys     of {run.path.name}: model, .*temperature(.*); others are refused$"
        more = re.search(line, server[2], re.M).group(1)
        assert ("tools" in more) == (run.path.name == "caller")


def test_each_run_answers_under_its_name(client, server, speakers):
    assert [m.id for m in client.models.list()] == [run.path.name for run in server[4]]
    for name in speakers:
        reply = ask(client, model=name)
        assert reply.choices[0].message.content.strip() == answer(name, 3, 8)
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage.completion_tokens == 8


def test_a_stream_gives_the_same_answer_in_pieces(client):
    events = list(ask(client, stream=True, stream_options={"include_usage": True}))
    pieces = [e.choices[0].delta.content or "" for e in events if e.choices]
    assert "".join(pieces).strip() == answer("fruit", 3, 8)
    assert len([p for p in pieces if p]) == 8
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"
    assert events[-1].usage.completion_tokens == 8


def test_a_stop_text_ends_an_answer(client):
    short = ask(client, max_tokens=24, stop=["pear"]).choices[0]
    # transformers leaves the text that stopped it in the answer.
    assert short.message.content.strip() in ("lemon grape peach", "lemon grape peach pear")
    assert short.finish_reason == "stop"


def test_temperature_and_seed_have_an_effect(client):
    """Without a digit in the question each of ten words is as likely to be the first."""
    values = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 1}
    drawn = [said(client, temperature=1, seed=5, **values) for _ in range(4)]
    assert len(set(drawn)) == 1
    assert len({said(client, temperature=1, seed=seed, **values) for seed in range(8)}) > 1


def check_call(client):
    reply = ask(client, model="caller", tools=TOOLS, max_tokens=32).choices[0]
    (call,) = reply.message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert reply.finish_reason == "tool_calls"


def test_tool_calls_come_as_openais_where_the_server_reads_them(server, client):
    if server[3] == "llama.cpp":
        check_call(client)
    # The template of this model writes no schemas.
    with pytest.raises(openai.BadRequestError, match="'tools': has no effect in this server"):
        ask(client, tools=TOOLS)


def test_transformers_reads_the_calls_of_a_qwen(caller_of, tmp_path):
    with serving([caller_of("transformers")], "transformers", tmp_path) as running:
        check_call(client_of(running))


def test_unknown_keys_names_and_routes_are_refused(server, client):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served; there is: fruit, "):
        ask(client, model="gpt-4")
    with pytest.raises(openai.BadRequestError, match="'mirostat': has no effect in this server"):
        ask(client, extra_body={"mirostat": 2})
    for key in ("top_k", "logprobs") if server[3] == "transformers" else ("n", "user"):
        with pytest.raises(openai.BadRequestError, match=f"'{key}': has no effect"):
            ask(client, extra_body={key: 1})
    with pytest.raises(openai.NotFoundError, match="there are POST /v1/chat/completions"):
        client.completions.create(model="fruit", prompt="x")


def test_a_wrong_key_and_a_page_elsewhere_get_nothing(server):
    wrong = client_of(server, "wrong")
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with pytest.raises(openai.AuthenticationError):
        ask(wrong)
    address, headers = f"{server[1]}/models", {"authorization": "Bearer secret"}
    for more in ({"host": "evil.example"}, {"origin": "https://evil.example"}):
        reply = httpx2.get(address, headers={**headers, **more}, timeout=300)
        assert reply.status_code == 403


def test_eight_requests_at_once_all_get_their_own_answer(client, speakers):
    def one(number):
        messages = [{"role": "user", "content": f"What color is box {number // 2}?"}]
        return said(client, messages=messages, model=speakers[number % len(speakers)])

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, range(8)))
    assert together == [answer(speakers[n % len(speakers)], n // 2, 8) for n in range(8)]


def test_readers_who_leave_free_the_model(client):
    for _ in range(5):  # one more than there are places
        under_way(client).close()
    assert said(client, max_tokens=2) == answer("fruit", 3, 2)
