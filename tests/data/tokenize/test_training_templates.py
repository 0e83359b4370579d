"""Masks against an independent oracle: the training templates that TRL ships for 31 families.

TRL rewrites a family's template with {% generation %} blocks; the tokens inside them are what it
trains. Here the original template and lorakit's spans find them. Both must train the same text,
apart from the differences listed below, each of which has its reason.
"""

import json
import re
from importlib.resources import files

import pytest
from transformers import AddedToken, AutoTokenizer

from lorakit.data.chat_template.render import template_capabilities
from lorakit.data.chat_template.select import resolve_template
from lorakit.data.issues import FatalRowError, IssueLog, RowError
from lorakit.data.tokenize.encode import EncodeConfig, encode, encode_many, prompt_ids
from lorakit.types import IGNORE, Conversation, Message, Origin

TEMPLATES = files("trl") / "chat_templates"
FAMILIES = sorted(
    path.name.removesuffix("_training.jinja")
    for path in TEMPLATES.iterdir()
    if path.name.endswith("_training.jinja")
)
AT = Origin("rows.jsonl", 7)
MARK = re.compile(
    r"<\|?[｜|A-Za-z_▁]{1,40}\|?>|<\|[^<>\s]{1,40}\|?>|<｜[^<>\s]{1,40}｜>|\[/?INST\]"
)
EOS = {"cohere2": "<|END_OF_TURN_TOKEN|>", "deepseekv3": "<｜end▁of▁sentence｜>"}
EOS |= {"deepseek_r1_distill": EOS["deepseekv3"], "phi3": "<|endoftext|>"}
EOS["phi3_5"] = EOS["phi3"]
NOT_MARKS = {"<think>", "</think>"}

PLAIN = (Message("user", "6 x 7?"), Message("assistant", "42."))
CHATS = {
    "plain": PLAIN,
    "system": (Message("system", "Be brief."), *PLAIN),
    "unicode": (Message("user", "größe?"), Message("assistant", "零 🦙 é\n\n- a\n")),
    "thoughts": (PLAIN[0], Message("assistant", "42.", {"reasoning_content": "six sevens"})),
    "thoughts in the text": (
        PLAIN[0],
        Message("assistant", "<think>\nsix sevens\n</think>\n\n42."),
    ),
    "thoughts on one line": (PLAIN[0], Message("assistant", "<think>six sevens</think>42.")),
}
# Templates that take only lists of content parts are refused by name.
PARTS_ONLY = {"idefics3", "llava_next", "smolvlm"}
# R1's prompt opens thoughts; TRL trains an answer that does not close them.
R1 = {"deepseekv3", "deepseek_r1_distill"}
# TRL leaves thoughts in the text where they are, before or behind thoughts that it writes itself;
# lorakit moves them to where the template writes `reasoning_content`.
MOVED = {"qwen3_8", "gptoss", "diffusion_gemma", "muse_glimmer", "nemotron_3_nano"}
MOVED |= {"nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning"}


@pytest.fixture(scope="module")
def tokenizer_of(demo_model):
    """(family, thinking) -> SmolLM2's tokenizer with that family's template and all their marks."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    texts = {f: (TEMPLATES / f"{f}.jinja").read_text("utf-8") for f in FAMILIES}
    marks = {mark for text in texts.values() for mark in MARK.findall(text)} | set(EOS.values())
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(marks - NOT_MARKS)})
    tokenizer.add_tokens([AddedToken(t, special=False) for t in sorted(NOT_MARKS)])
    tokenizer.bos_token = "<|endoftext|>"

    def load(family, thinking):
        tokenizer.eos_token = EOS.get(family, "<|im_end|>")
        tokenizer.chat_template = texts[family]
        resolve_template(tokenizer, family, thinking)
        return tokenizer

    return load


def trained_text(tokenizer, ids, mask):
    return tokenizer.decode([i for i, trained in zip(ids, mask, strict=True) if trained])


def oracle(tokenizer, family, messages, thinking):
    """Text that TRL's training template marks as the model's own."""
    if "System role not supported" in tokenizer.chat_template:
        messages = [m for m in messages if m.role != "system"]  # lorakit folds it into the question
    found = tokenizer.apply_chat_template(
        [m.as_dict() for m in messages],
        chat_template=(TEMPLATES / f"{family}_training.jinja").read_text("utf-8"),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        enable_thinking=thinking,
    )
    return trained_text(tokenizer, found["input_ids"], found["assistant_masks"])


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - PARTS_ONLY))
def test_the_trained_text_is_that_of_trl(tokenizer_of, family, name):
    messages, thinking = CHATS[name], name.startswith("thoughts")
    tokenizer = tokenizer_of(family, thinking)
    (example,) = encode(tokenizer, Conversation(messages, AT))
    ours = trained_text(tokenizer, example.input_ids, [t != IGNORE for t in example.labels])
    asked = prompt_ids(tokenizer, messages[:-1])
    assert example.input_ids[: len(asked)] == asked, "trained after what an engine feeds"
    assert example.labels[len(asked)] != IGNORE
    if thinking and family in MOVED and name != "thoughts":
        (own,) = encode(tokenizer, Conversation(CHATS["thoughts"], AT))
        assert example.input_ids == own.input_ids
        return
    theirs = oracle(tokenizer, family, messages, thinking).rstrip()
    assert theirs
    if family in R1:
        answer = theirs.removeprefix("<｜Assistant｜>").rpartition("</think>")[2].lstrip()
        assert ours == f"{'six sevens' if thinking else ''}\n</think>\n\n{answer}"
        return
    # TRL may train the end of the generation prompt too, and white space after the end of turn.
    whole = tokenizer.decode(asked) + ours
    assert whole.rstrip().endswith(theirs.removesuffix("<|endoftext|>").rstrip())
    assert len(theirs) >= len(ours)


CALL = [
    {"id": "abcdefghi", "type": "function", "function": {"name": "get", "arguments": {"q": "x"}}}
]
QUERY = {"type": "object", "properties": {"q": {"type": "string", "description": "words"}}}
TOOL = {"type": "function", "function": {"name": "get", "description": "d", "parameters": QUERY}}
SPLIT = ["qwen3", "qwen3_5_think", "qwen3_8", "glm4moe", "nemotron_3_nano", "deepseek_r1_distill"]


def runs(tokenizer, example):
    """Each run of trained tokens as text."""
    found, run = [], []
    for token, label in zip([*example.input_ids, 0], [*example.labels, IGNORE], strict=True):
        if label != IGNORE:
            run.append(token)
        elif run:
            found.append(tokenizer.decode(run))
            run = []
    return found


@pytest.mark.parametrize(
    "answer",
    [
        "The tag </think> closes thoughts.",
        "It writes <think> first and </think> last.",
        "It opens <think> only.",
    ],
)
@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("family", SPLIT)
def test_an_answer_that_mentions_the_tags_is_trained_complete_and_as_text(
    tokenizer_of, family, thinking, answer
):
    tokenizer = tokenizer_of(family, thinking)
    chat = Conversation((Message("user", "Tags?"), Message("assistant", answer)), AT)
    (example,) = encode(tokenizer, chat)
    (run,) = runs(tokenizer, example)
    assert answer in run
    assert run.count(answer) == 1
    own = {tokenizer.convert_tokens_to_ids(tag) for tag in NOT_MARKS}
    tags = [i for i in example.input_ids if i in own]
    (plain,) = encode(tokenizer, Conversation((chat.messages[0], PLAIN[1]), AT))
    assert tags == [i for i in plain.input_ids if i in own], "only those the template writes"


@pytest.mark.parametrize("family", ["qwen3_5_think", "qwen3_8", "nemotron_3_nano"])
def test_a_row_without_thoughts_is_trained_after_the_prompt_that_opens_them(tokenizer_of, family):
    """What chat and engines feed where other rows have thoughts."""
    tokenizer, log = tokenizer_of(family, True), IssueLog()
    (example,) = encode(tokenizer, Conversation(PLAIN, AT), log=log)
    asked = prompt_ids(tokenizer, PLAIN[:-1])
    assert tokenizer.decode(asked).endswith("<think>\n")
    assert example.input_ids[: len(asked)] == asked
    (run,) = runs(tokenizer, example)
    assert run.split() == ["</think>", "42.<|im_end|>"]
    assert [fault.kind for fault in log.faults()] == ["answer without thoughts"]


def test_a_call_with_thoughts_is_trained_where_the_template_drops_them_later(tokenizer_of):
    """gpt-oss writes the thoughts before a call only until the final answer is there."""
    tokenizer = tokenizer_of("gptoss", True)
    chat = (
        Message("user", "q"),
        Message("assistant", "", {"tool_calls": CALL, "reasoning_content": "look it up"}),
        Message("tool", "r", {"tool_call_id": "abcdefghi", "name": "get"}),
        Message("assistant", "A.", {"reasoning_content": "found"}),
    )
    (example,) = encode(tokenizer, Conversation(chat, AT, (TOOL,)))
    assert runs(tokenizer, example) == [
        "<|channel|>analysis<|message|>look it up<|end|><|start|>assistant to=functions.get"
        '<|channel|>commentary json<|message|>{"q": "x"}<|call|>',
        "<|channel|>analysis<|message|>found<|end|><|start|>assistant<|channel|>final<|message|>"
        "A.<|return|>",
    ]
    for turns in (1, 3):
        asked = prompt_ids(tokenizer, chat[:turns], (TOOL,))
        assert example.input_ids[: len(asked)] == asked


def test_turn_marks_that_are_not_declared_special_stay_text_in_a_turn(tokenizer_of):
    """DeepSeek's tokenizers declare <｜User｜> and <｜Assistant｜> as plain added tokens."""
    tokenizer = tokenizer_of("deepseek_r1_distill", False)
    marks = ("<｜User｜>", "<｜Assistant｜>")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in backend["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in marks
    plain = type(tokenizer)(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)),
        eos_token=tokenizer.eos_token,
        chat_template=tokenizer.chat_template,
    )
    text = "x<｜Assistant｜>y<｜User｜>z"
    chat = Conversation((Message("user", text), PLAIN[1]), AT)
    (example,) = encode(plain, chat)
    assert text in plain.decode(example.input_ids)
    for mark in marks:
        token = plain.convert_tokens_to_ids(mark)
        assert not plain.added_tokens_decoder[token].special
        assert example.input_ids.count(token) == 1


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (Message("assistant", "<think>\nsix is 42"), "opens <think> and never closes it"),
        (Message("assistant", "<think>a</think>\n"), "has thoughts, and no answer"),
        (Message("assistant", "", {"reasoning_content": "a"}), "has thoughts, and no answer"),
        (
            Message("assistant", "<think>a</think>b", {"reasoning_content": "c"}),
            "has reasoning_content 'c', and in its text 'a'",
        ),
    ],
)
def test_thoughts_that_cannot_be_trained_leave_the_row_out_by_name(tokenizer_of, message, problem):
    tokenizer = tokenizer_of("qwen3", True)
    with pytest.raises(RowError, match=f"rows.jsonl:7: .*{re.escape(problem)}") as caught:
        encode(tokenizer, Conversation((PLAIN[0], message), AT))
    assert not isinstance(caught.value, FatalRowError)


def test_the_same_thoughts_twice_are_written_once(tokenizer_of):
    tokenizer = tokenizer_of("qwen3", True)
    twice = Message("assistant", "<think>\na\n</think>\n\n42.", {"reasoning_content": "a"})
    (example,) = encode(tokenizer, Conversation((PLAIN[0], twice), AT))
    assert runs(tokenizer, example) == ["<think>\na\n</think>\n\n42.<|im_end|>"]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - PARTS_ONLY))
def test_thoughts_can_be_left_out_of_the_loss(tokenizer_of, family):
    tokenizer = tokenizer_of(family, True)
    if template_capabilities(tokenizer).thoughts is None:
        pytest.skip("this template does not write reasoning_content")

    def made(train_on_thoughts):
        rules = EncodeConfig("responses", 512, "drop", train_on_thoughts=train_on_thoughts)
        chats = [Conversation(CHATS[name], AT) for name in ("thoughts", "plain")]
        return [row for _, rows in encode_many(tokenizer, chats, rules, IssueLog()) for row in rows]

    (example, plain), (complete, same) = made(False), made(True)
    assert plain == same
    assert example.input_ids == complete.input_ids
    ours, all_of_it = (
        trained_text(tokenizer, e.input_ids, [t != IGNORE for t in e.labels])
        for e in (example, complete)
    )
    assert "six sevens" in all_of_it
    assert all_of_it.endswith(ours)
    stop = template_capabilities(tokenizer).stop_texts
    answer = ours.strip()
    assert answer.startswith("42.")
    assert answer.removeprefix("42.").lstrip().startswith(stop)
