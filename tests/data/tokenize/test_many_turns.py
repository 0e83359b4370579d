"""Chats of many answers: the masks of rendering every answer with all its turns, in linear time."""

from importlib.resources import files

import pytest

from lorakit.data.chat_template.select import resolve_template
from lorakit.data.issues import IssueLog, RowError
from lorakit.data.tokenize import encode as encode_module
from lorakit.data.tokenize import spans
from lorakit.data.tokenize.encode import EncodeConfig, encode_many
from lorakit.types import Conversation, Message, Origin

AT = Origin("rows.jsonl", 1)
WORDS = ["boat", "größe", "日本", "rope", "x=1", "keel"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUERY = {"type": "object", "properties": {"q": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "get", "description": "d", "parameters": QUERY}}


def ask(i):
    return Message("user", f"{WORDS[i % 6]} {i}?")


def say(i, train=True, **extra):
    return Message("assistant", f"{WORDS[i % 5]} {i}" if i % 4 else "ok", extra, train)


def plain(count):
    return [turn for i in range(count) for turn in (ask(i), say(i))]


def agent(count, thoughts=True):
    """One question, many calls: the thoughts and the question matter to all of them."""
    turns = [Message("system", "Use tools."), ask(0)]
    for i in range(count):
        function = {"name": "get", "arguments": {"q": WORDS[i % 6]}}
        call = {"id": f"abcdef{i:03d}", "type": "function", "function": function}
        extra = {"reasoning_content": f"thought {i}"} if thoughts else {}
        turns += [say(i, tool_calls=[call], **extra)]
        turns += [Message("tool", f"result {i}", {"tool_call_id": call["id"], "name": "get"})]
    return [*turns, say(count)]


CHATS = {
    "plain": plain(12),
    "system": [Message("system", "Be brief."), *plain(12)],
    "marks": [t for i in range(16) for t in (ask(i), say(i, train=i % 3 > 0))],
    "last marked": [*plain(11), ask(1), say(1, train=False)],
    "special token": [*plain(5), Message("user", "a <|im_end|> b"), say(1), *plain(7)],
    "some thoughts": [*plain(6), ask(1), say(1, reasoning_content="hm"), *plain(6)],
    "thoughts": [t for i in range(10) for t in (ask(i), say(i, reasoning_content="hm"))],
    "agent": agent(12),
    "agents": agent(5) + agent(4, thoughts=False)[1:] + agent(3)[1:],
}
RULES = {
    "whole": EncodeConfig("responses", 10_000, "drop"),
    "without thoughts": EncodeConfig("responses", 10_000, "drop", train_on_thoughts=False),
    "all": EncodeConfig("all", 10_000, "drop"),
    "oldest dropped": EncodeConfig("responses", 150, "drop_oldest_turns"),
    "split": EncodeConfig("responses", 150, "split"),
}


def made(tokenizer, turns, rules):
    tools = (TOOL,) if any(turn.role == "tool" for turn in turns) else ()
    log = IssueLog()
    ((_, found),) = encode_many(tokenizer, [Conversation(tuple(turns), AT, tools)], rules, log)
    if isinstance(found, RowError):
        found = found.kind
    return found, [(fault.kind, fault.action, fault.count) for fault in log.faults()]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "qwen3_5_think"])
def test_windows_give_the_masks_of_the_complete_chat(family, monkeypatch, name, rules):
    tokenizer = family("qwen3" if name == "qwen3_5_think" else name, thinking=True)
    if name == "qwen3_5_think":  # its prompt opens thoughts with tokens that an answer may not
        path = files("trl") / "chat_templates" / f"{name}.jinja"
        tokenizer.chat_template = path.read_text("utf-8")
        resolve_template(tokenizer, name, True)
    kinds = set(CHATS) - ({"agent", "agents"} if name == "smollm2" else set())
    if RULES[rules].on_overlength != "drop" or RULES[rules].cutoff_len < 1000:
        kinds &= {"plain", "some thoughts", "agents"}
    exact = {kind: made(tokenizer, CHATS[kind], RULES[rules]) for kind in kinds}
    monkeypatch.setattr(spans, "WINDOW", 3)
    windowed = {kind: made(tokenizer, CHATS[kind], RULES[rules]) for kind in kinds}
    assert windowed == exact


@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_twice_the_turns_are_twice_the_work(family, monkeypatch, name):
    tokenizer = family(name)
    rendered = []
    real = spans.render_chat

    def counted(tokenizer, messages, *args, **kwargs):
        rendered.append(len(messages))
        return real(tokenizer, messages, *args, **kwargs)

    monkeypatch.setattr(spans, "render_chat", counted)
    monkeypatch.setattr(spans, "WINDOW", 3)
    rules, work = EncodeConfig("responses", 60, "drop_oldest_turns"), []
    for count in (20, 40):
        rendered.clear()
        made(tokenizer, plain(count), rules)
        work.append(sum(rendered))
    assert work[1] < 2.5 * work[0]


def test_a_template_that_changes_far_turns_is_rendered_completely(smollm, monkeypatch):
    """It numbers the turns from the beginning, which no window can know."""
    smollm.chat_template = CHATML.replace("{{ m.role }}", "{{ m.role }} {{ loop.index }}").replace(
        "<|im_start|>assistant", "<|im_start|>assistant {{ messages | length + 1 }}"
    )
    resolve_template(smollm, "some/model")
    exact = made(smollm, plain(12), RULES["whole"])
    monkeypatch.setattr(spans, "WINDOW", 3)
    assert made(smollm, plain(12), RULES["whole"]) == exact
    (example,) = exact[0]
    assert "assistant 24\n" in smollm.decode(example.input_ids)


def test_the_first_answer_at_fault_is_named(smollm, monkeypatch):
    """This template writes no answer that says "no"."""
    smollm.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content | replace('no', '') }}")
    resolve_template(smollm, "some/model")
    chat = plain(12)
    chat[15], chat[23] = Message("assistant", "no 15"), Message("assistant", "no 23")
    monkeypatch.setattr(spans, "WINDOW", 3)
    with pytest.raises(RowError, match="'no 15' became ' 15'"):
        encode_module.encode(smollm, Conversation(tuple(chat), AT))


@pytest.mark.parametrize("fits", [1, 3, 9, 12])
@pytest.mark.parametrize("near", [0, 5, 11])
def test_the_fewest_exchanges_are_dropped_from_wherever_the_search_begins(smollm, fits, near):
    whole = Conversation(tuple(plain(12)), AT)
    lengths = []
    for dropped in range(12):
        part = plain(12)[2 * dropped :]
        lengths.append(len(made(smollm, part, RULES["whole"])[0][0].input_ids))
    rules = EncodeConfig("responses", lengths[12 - fits], "drop_oldest_turns")
    found, example = encode_module._longest_fitting(smollm, whole, rules, 0, near)
    assert (found, len(example.input_ids)) == (12 - fits, rules.cutoff_len)
