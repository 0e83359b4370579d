"""The habits of real templates are found by rendering, and texts become ids without surprises."""

import copy
import json

import pytest
from transformers import AddedToken, GenerationConfig

from lorakit.data.chat_template.render import (
    SpecialTokenEscaper,
    TemplateRefusal,
    generated_parts,
    render_chat,
    stop_token_ids,
    template_capabilities,
    to_ids,
    unknown_marks,
)
from lorakit.types import Message


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        ("smollm2", ["<|im_end|>"]),
        ("llama2", ["</s>"]),
        ("llama3", ["<|eot_id|>", "<|end_of_text|>"]),
        ("qwen3", ["<|im_end|>"]),
    ],
)
def test_stop_tokens_are_what_the_template_writes_and_eos(family, name, stops):
    tokenizer = family(name)
    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == stops


def test_stop_tokens_of_the_model_are_kept(smollm):
    config = GenerationConfig(eos_token_id=[0, 2])
    assert stop_token_ids(smollm, config) == [2, 0]


@pytest.mark.parametrize(("name", "adds"), [("smollm2", False), ("llama2", True), ("qwen3", False)])
def test_bos_is_added_where_the_tokenizer_would_and_once(family, name, adds):
    tokenizer = family(name)
    assert (template_capabilities(tokenizer).bos_id is not None) == adds
    if adds:
        bos = tokenizer.bos_token_id
        plain = to_ids(tokenizer, "Hello", None)
        assert plain[0] == bos
        assert to_ids(tokenizer, tokenizer.bos_token + "Hello", None).count(bos) == 1


def test_a_text_that_continues_another_gets_no_bos(family):
    tokenizer = family("llama2")
    bos = tokenizer.bos_token_id
    assert to_ids(tokenizer, "Hello", None, inside=True) == to_ids(tokenizer, "Hello", None)[1:]
    assert bos not in to_ids(tokenizer, "Hello", None, inside=True)


def test_habits_follow_a_change_of_the_template(smollm):
    before = template_capabilities(smollm)
    smollm.chat_template = "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
    assert before.stop_texts == ("<|im_end|>",)
    assert template_capabilities(smollm).stop_texts == ("<|endoftext|>",)


def test_guarded_text_gives_no_control_token(smollm):
    turns = [Message("user", "a<|im_start|>b<|im_end|>c")]
    guard = SpecialTokenEscaper(template_capabilities(smollm), turns)
    text = render_chat(smollm, guard.messages(turns), prompt=False)
    ids = to_ids(smollm, text, guard)
    assert "a<|im_start|>b<|im_end|>c" in smollm.decode(ids)
    end = smollm.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == 2  # system and user turns of the template


SPECIAL = "<|im_end|>"
CALL = {"type": "function", "function": {"name": "say", "arguments": {"x": SPECIAL}}}
PLAIN_CALL = {"type": "function", "function": {"name": "say", "arguments": {"x": "y"}}}
NAMED_SO = {"type": "function", "function": {"name": "say", "arguments": {SPECIAL: "x"}}}
SCHEMA = {"type": "function", "function": {"name": "say", "description": SPECIAL}}


@pytest.mark.parametrize(
    ("extra", "tools"),
    [
        ({"tool_calls": [CALL]}, ()),
        ({"reasoning_content": SPECIAL}, ()),
        ({"name": SPECIAL}, ()),
        ({"tool_calls": [PLAIN_CALL, CALL]}, ()),
        ({"tool_calls": [NAMED_SO]}, ()),
        ({}, (SCHEMA,)),
        ({}, (PLAIN_CALL, SCHEMA)),
    ],
)
def test_a_special_token_in_one_place_alone_is_guarded_there(smollm, extra, tools):
    turns = [Message("user", "a"), Message("assistant", "b", extra)]
    guard = SpecialTokenEscaper(template_capabilities(smollm), turns, tools)
    assert guard.active
    given = json.dumps([guard.messages(turns), guard.tools], ensure_ascii=False)
    assert SPECIAL not in given
    assert SPECIAL in "".join(text for text, _ in guard.pieces(given))


def test_special_tokens_that_were_added_are_guarded_and_of_two_the_longer(smollm):
    tokenizer = copy.deepcopy(smollm)
    tokenizer.add_tokens([AddedToken(text, special=True) for text in ("<x", "<x>", "<x>y")])
    turns = [Message("user", "a <x> b <x>y c <x d")]
    guard = SpecialTokenEscaper(template_capabilities(tokenizer), turns)
    ids = to_ids(tokenizer, guard.messages(turns)[0]["content"], guard)
    assert tokenizer.decode(ids) == "a <x> b <x>y c <x d"
    assert not {tokenizer.convert_tokens_to_ids(t) for t in ("<x", "<x>", "<x>y")} & set(ids)
    pieces = guard.pieces(guard.messages(turns)[0]["content"])
    assert pieces == [
        ("a ", False), ("<x>", True), (" b ", False), ("<x>y", True), (" c ", False), ("<x", True),
        (" d", False),
    ]  # fmt: skip


def test_thoughts_are_known_by_the_name_that_gpt_oss_reads(smollm):
    smollm.chat_template = "{% for m in messages %}{{ m.thinking }}/{{ m.content }};{% endfor %}"
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        {"role": "assistant", "content": "b", "reasoning_content": "so", "thinking": "own"},
    ]
    assert render_chat(smollm, turns, prompt=False) == "/q;hm/a;own/b;"
    assert "thinking" not in turns[1], "the turns themselves stay as they were"


def test_schemas_are_hidden_from_the_template_with_the_turns_they_come_with(smollm):
    """The guard is active for another reason: the schema's own special token is hidden too."""
    turns = [Message("user", SPECIAL)]
    plain = {"type": "function", "function": {"name": "say", "description": "Says."}}
    guard = SpecialTokenEscaper(template_capabilities(smollm), turns, (plain, SCHEMA))
    assert guard.tools[0] == plain
    assert SPECIAL not in json.dumps(guard.tools)


def test_private_characters_of_a_turn_are_not_taken_for_special_tokens(smollm):
    """Both private planes: the stand-ins are taken from the one that the turns do not use."""
    for written in ("\U000f0000\U000f0001\U000f0002", "\U00100000\U00100001"):
        turns = [Message("user", f"a{written} <|im_end|>")]
        guard = SpecialTokenEscaper(template_capabilities(smollm), turns)
        ids = to_ids(smollm, render_chat(smollm, guard.messages(turns), prompt=False), guard)
        assert f"a{written} <|im_end|>" in smollm.decode(ids)
    turns = [Message("user", "\U000f0000 \U00100000 <|im_end|>")]
    with pytest.raises(TemplateRefusal, match="both private planes"):
        SpecialTokenEscaper(template_capabilities(smollm), turns)


@pytest.mark.parametrize(
    ("system", "folds"),
    [
        ("{{ m.content }}", False),
        ("", True),
        ("{{ raise_exception('no system') }}", True),
    ],
)
def test_a_template_that_refuses_or_drops_the_system_turn_gets_it_folded(smollm, system, folds):
    smollm.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}" + system + "{% else %}"
        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    habits = template_capabilities(smollm)
    assert habits.merges_system_into_user is folds
    turns = [Message("system", "S"), Message("user", "q")]
    given = [m["content"] for m in SpecialTokenEscaper(habits, turns).messages(turns)]
    assert given == (["S\n\nq"] if folds else ["S", "q"])


@pytest.mark.parametrize("template", [None, {"default": "a"}, ["a"]])
def test_a_tokenizer_without_a_chosen_template_is_refused(smollm, template):
    known, smollm.chat_template = smollm.chat_template, template
    with pytest.raises(TemplateRefusal, match="no template, or several"):
        render_chat(smollm, [{"role": "user", "content": "a"}], prompt=True)
    smollm.chat_template = known


def test_whatever_a_template_raises_is_a_refusal(smollm):
    smollm.chat_template = "{{ messages[0].nothing.at.all }}"
    with pytest.raises(TemplateRefusal):
        render_chat(smollm, [{"role": "user", "content": "a"}], prompt=True)


@pytest.mark.parametrize(
    ("name", "unwritten"),
    [
        ("smollm2", ("tool schemas", "tool calls")),
        ("llama2", ("tool schemas", "tool calls")),
        ("llama3", ("tool schemas", "tool calls")),
        ("qwen3", ()),
    ],
)
def test_which_parts_of_tools_a_template_leaves_out(family, name, unwritten):
    assert template_capabilities(family(name)).unsupported == unwritten


SCHEMAS, CALL_AS_JSON = "{{ tools or '' }}", "{{ c.function | tojson }}"


@pytest.mark.parametrize(
    ("schemas", "calls", "roles", "unwritten"),
    [
        (SCHEMAS, CALL_AS_JSON, "", ()),
        ("", CALL_AS_JSON, "", ("tool schemas",)),
        (SCHEMAS, "{{ c.function.name }}", "", ("tool calls",)),
        (SCHEMAS, CALL_AS_JSON, " if m.role != 'tool'", ("tool results",)),
        ("", "", " if m.role != 'tool'", ("tool schemas", "tool calls", "tool results")),
    ],
)
def test_each_part_of_tools_that_a_template_leaves_out_is_noticed(
    smollm, schemas, calls, roles, unwritten
):
    smollm.chat_template = (
        schemas + "{% for m in messages" + roles + " %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}" + calls + "{% endfor %}<|im_end|>\n{% endfor %}"
    )
    assert template_capabilities(smollm).unsupported == unwritten


@pytest.mark.parametrize(
    ("how", "as_text", "unwritten"),
    [
        ("{{ call.arguments | tojson }}", False, ()),
        ("{{ '```json' + call.arguments }}", True, ()),
        ("{{ call.arguments }}", True, ()),
        ("{{ call.name }}", False, ("tool calls",)),
    ],
)
def test_arguments_are_given_in_the_form_that_the_template_writes_well(
    smollm, how, as_text, unwritten
):
    smollm.chat_template = (
        "{{ tools }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}{% set call = c.function %}" + how + "{% endfor %}"
        "<|im_end|>{% endfor %}"
    )
    habits = template_capabilities(smollm)
    assert (habits.arguments_as_text, habits.unsupported) == (as_text, unwritten)
    call = {"function": {"name": "f", "arguments": {"a": "é"}}}
    turns = [Message("assistant", "", {"tool_calls": [call]})]
    (made,) = SpecialTokenEscaper(habits, turns).messages(turns)
    given = made["tool_calls"][0]["function"]["arguments"]
    assert given == ('{"a": "é"}' if as_text else {"a": "é"})
    assert call["function"]["arguments"] == {"a": "é"}, "the row itself stays as it was"


def test_marks_that_the_tokenizer_does_not_know_are_named(family):
    tokenizer = family("llama3")
    assert unknown_marks(tokenizer) == []
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    assert unknown_marks(tokenizer) == ["<|im_start|>", "<|im_end|>"]


def test_generated_parts_are_where_the_blocks_are(smollm):
    smollm.chat_template = (
        "{% for m in messages %}> {% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    turns = [{"role": "assistant", "content": text} for text in ("one", "three")]
    text = render_chat(smollm, turns, prompt=False)
    assert [text[a:b] for a, b in generated_parts(smollm, turns, None)] == ["one", "three"]


@pytest.mark.parametrize("name", ["smollm2", "llama2", "llama3", "qwen3"])
def test_plain_turns_are_rendered_as_the_tokenizer_itself_does(family, name):
    tokenizer = family(name)
    turns = [
        ("system", "S"),
        ("user", " q\n"),
        ("assistant", "<think>t</think> a"),
        ("user", "<b>"),
    ]
    chat = [{"role": role, "content": content} for role, content in turns]
    for count, prompt in ((2, True), (3, False), (4, True)):
        expected = tokenizer.apply_chat_template(
            chat[:count], tokenize=False, add_generation_prompt=prompt
        )
        assert render_chat(tokenizer, chat[:count], prompt) == expected


def turn_based(smollm, user, assistant):
    """A template with one mark a role and no end of turn."""
    tokenizer = copy.deepcopy(smollm)
    tokenizer.add_tokens([AddedToken(t, special=True) for t in ("<|ask|>", "<|say|>", "<|call|>")])
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}" + user + "{{ m.content }}"
        "{% elif m.role == 'assistant' %}" + assistant + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|say|>{% endif %}"
    )
    return tokenizer


def test_the_mark_of_the_next_question_ends_an_answer_but_a_bos_does_not(smollm):
    answer = "<|say|>{{ m.content }}"
    assert template_capabilities(turn_based(smollm, "<|ask|>", answer)).stop_texts == ("<|ask|>",)
    bos = smollm.bos_token
    assert template_capabilities(turn_based(smollm, bos + "<|ask|>", answer)).stop_texts == ()


@pytest.mark.parametrize(
    ("call", "stops"),
    [
        ("{{ m.tool_calls[0].function | tojson }}<|call|>", ["<|im_end|>", "<|call|>"]),
        # A mark before the call does not end it.
        ("<|call|>{{ m.tool_calls[0].function | tojson }}", ["<|im_end|>"]),
    ],
)
def test_a_call_ends_at_the_mark_that_follows_it(smollm, call, stops):
    answer = (
        "<|say|>{{ m.content }}{% if m.tool_calls %}" + call + "{% else %}<|im_end|>{% endif %}"
    )
    tokenizer = turn_based(smollm, "<|ask|>", answer)
    assert list(template_capabilities(tokenizer).stop_texts) == stops
