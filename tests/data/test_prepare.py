"""From source strings to examples: every row is kept or reported, and the report adds up."""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.data import prepare as module
from lorakit.data.dataset import read_validation, write_validation
from lorakit.data.issues import FatalRowError
from lorakit.data.prepare import prepare_data
from lorakit.errors import DataError, LorakitError
from lorakit.recipe.schema import Recipe
from lorakit.types import Conversation, Document, Message, Origin

GOOD = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(40)]


def recipe(data, **values):
    return Recipe.model_validate({"model": "demo", "data": data, **values})


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def counts(report):
    return {f.kind: f.count for f in report.faults}


def test_examples_and_report_add_up(smollm, tmp_path):
    prepared = prepare_data(recipe(write(tmp_path, GOOD)), smollm)
    report = prepared.report
    assert (len(prepared.train), len(prepared.val)) == (38, 2)
    assert (report.rows_read, report.examples_train, report.examples_val) == (40, 38, 2)
    assert report.tokens_train == sum(len(e.input_ids) for e in prepared.train)
    assert report.trained_tokens_val == sum(e.trained_tokens for e in prepared.val)
    assert report.sources[0]["format"] == "question/answer"
    assert str(tmp_path) not in json.dumps(report.as_dict())
    held = {str(c.origin) for c in prepared.val_conversations}
    assert held == {str(e.origin) for e in prepared.val}


def test_unusable_rows_are_left_out_and_counted(smollm, tmp_path):
    bad = [{"question": "a", "answer": None}, {"question": "b"}, {"question": "", "answer": "x"}]
    report = prepare_data(recipe(write(tmp_path, GOOD + bad)), smollm).report
    assert counts(report) == {"no answer": 2, "no question": 1}
    assert report.faults[0].first_rows == ("rows.jsonl:41", "rows.jsonl:42")
    assert report.rows_read == report.examples_train + report.examples_val + 3


def test_duplicates_and_overlap_are_reported(smollm, tmp_path):
    train, held = write(tmp_path, [*GOOD, GOOD[3]]), write(tmp_path, GOOD[:2], "val.jsonl")
    prepared = prepare_data(recipe(train, val_data=held), smollm)
    assert (len(prepared.train), len(prepared.val)) == (41, 2)
    assert counts(prepared.report) == {
        "exact duplicate": 1,
        "held-out row is also in the training data": 2,
    }


def test_sources_of_several_formats_are_joined(smollm, tmp_path):
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed", GOOD[:3], "a.jsonl")
    write(tmp_path / "mixed", [{"instruction": "i", "output": "o"}], "b.jsonl")
    other = write(tmp_path, [{"prompt": "p", "completion": "c"}], "c.jsonl")
    prepared = prepare_data(recipe(["mixed", other], val_size=0), smollm, [tmp_path])
    assert [s["format"] for s in prepared.report.sources] == [
        "question/answer, alpaca",
        "prompt/completion",
    ]
    assert [str(e.origin) for e in prepared.train] == [
        "a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1", "c.jsonl:1",
    ]  # fmt: skip


def test_a_system_prompt_of_the_recipe_is_in_every_example(smollm, tmp_path):
    prepared = prepare_data(recipe(write(tmp_path, GOOD[:4]), system="Be brief."), smollm)
    assert all("Be brief." in smollm.decode(e.input_ids) for e in prepared.train)


def test_a_single_document_is_cut_in_two_for_validation(smollm, tmp_path):
    text = "\n\n".join(f"Paragraph {i} says something." for i in range(60))
    (tmp_path / "book.txt").write_text(text)
    prepared = prepare_data(recipe(str(tmp_path / "book.txt"), cutoff_len=64, val_size=0.2), smollm)
    both = [*prepared.train_conversations, *prepared.val_conversations]
    assert "".join(item.text for item in both) == text
    assert 0.15 < len(both[1].text) / len(text) < 0.25
    assert len(prepared.train) > 2
    assert "151 of 781 tokens of a single document" in counts(prepared.report)


def test_few_long_texts_held_out_are_told_by_their_share(smollm, tmp_path):
    for name, told in (("a.txt", "The harbor of town {} opens in March."), ("b.txt", "A {} cat.")):
        words = (told.format(i) for i in range(300))
        (tmp_path / name).write_text("\n\n".join(words))
    report = prepare_data(recipe(str(tmp_path), strict=True), smollm).report
    (kind,) = counts(report)
    share = report.tokens_val / (report.tokens_val + report.tokens_train)
    assert kind == f"{share:.0%} of the tokens are held out"
    folder = tmp_path / "rows"
    folder.mkdir()
    assert counts(prepare_data(recipe(write(folder, GOOD)), smollm).report) == {}


def test_data_with_thoughts_keeps_thinking_on(family, tmp_path):
    rows = [{"question": f"{i}?", "answer": f"<think>\nhm\n</think>\n\n{i}"} for i in range(4)]
    prepared = prepare_data(recipe(write(tmp_path, rows)), family("qwen3", thinking=True))
    assert "thinking off" not in prepared.report.template


def test_held_out_rows_survive_the_way_through_the_run_folder(smollm, tmp_path):
    prepared = prepare_data(recipe(write(tmp_path, GOOD), system="Zwölf\u2028!"), smollm)
    items = [*prepared.val_conversations, Document("Text\r\nof it", prepared.val[0].origin)]
    write_validation(tmp_path / "validation.jsonl", items)
    assert read_validation(tmp_path / "validation.jsonl") == items
    write_validation(tmp_path / "none.jsonl", [])
    assert read_validation(tmp_path / "none.jsonl") == []
    assert read_validation(tmp_path / "never-written.jsonl") == []


def test_a_validation_file_is_openai_messages(smollm, tmp_path):
    prepared = prepare_data(recipe(write(tmp_path, GOOD)), smollm)
    path = tmp_path / "validation.jsonl"
    write_validation(path, prepared.val_conversations)
    again = prepare_data(recipe(str(path), val_size=0), smollm)
    assert [e.input_ids for e in again.train] == [e.input_ids for e in prepared.val]


def test_nothing_usable_is_one_clear_error(smollm, tmp_path):
    path = write(tmp_path, [{"question": "a", "answer": ""}] * 3)
    with pytest.raises(DataError, match=r"none of its 3 rows can be used: 3 x no answer"):
        prepare_data(recipe(path), smollm)


def test_too_few_rows_to_split_says_where_the_others_went(smollm, tmp_path):
    path = write(tmp_path, [GOOD[0], {"question": "a", "answer": None}, {"question": "b"}])
    with pytest.raises(DataError, match=r"1 usable row cannot .* 2 rows were left out: 2 x no ans"):
        prepare_data(recipe(path), smollm)


def test_all_rows_too_long_is_one_clear_error(smollm, tmp_path):
    path = write(tmp_path, [{"question": f"{i}?", "answer": "long " * 50} for i in range(3)])
    with pytest.raises(DataError, match=r"3 x too long .*over cutoff_len 16") as caught:
        prepare_data(recipe(path, cutoff_len=16), smollm)
    assert "raise cutoff_len" in caught.value.hint


# -- sabotage: a good file, one thing spoiled, refused with the row named ----------------------


def spoil(tokenizer, old, new):
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)


def strip_eos(tokenizer):
    spoil(
        tokenizer,
        "message['content'] + '<|im_end|>'",
        "message['content'] + ('' if message['content'] == '6' else '<|im_end|>')",
    )


def two_bos(tokenizer):
    spoil(
        tokenizer,
        "set content = bos_token + content",
        "set content = bos_token + (bos_token if '3 + 3' in content else '') + content",
    )


def mask_all(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content == '6' %}6<|im_end|>"
        "{% elif m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


SABOTAGE = {
    "eos stripped": ("smollm2", strip_eos, {}, "writes no end-of-turn token"),
    "two BOS": ("llama3", two_bos, {}, "begins with two BOS tokens"),
    "everything masked": ("smollm2", mask_all, {}, "generation %} block leaves"),
    "answer over the length": (
        "smollm2",
        lambda tokenizer: None,
        {"cutoff_len": 60, "on_overlength": "error"},
        r"too long: \d+ tokens, over cutoff_len 60",
    ),
}


@pytest.mark.parametrize("case", SABOTAGE)
def test_one_spoiled_row_stops_a_run_and_is_named_by_inspect(family, tmp_path, case):
    name, sabotage, values, message = SABOTAGE[case]
    tokenizer = family(name)
    rows = [dict(row) for row in GOOD[:8]]
    if values:
        rows[3]["question"] += " x y z" * 10
    path = write(tmp_path, rows)
    assert prepare_data(recipe(path, **values | {"cutoff_len": 99}), tokenizer).report.faults == ()
    sabotage(tokenizer)
    with pytest.raises(FatalRowError, match=rf"^rows.jsonl:4: .*{message}"):
        prepare_data(recipe(path, **values), tokenizer)
    report = prepare_data(recipe(path, **values), tokenizer, inspecting=True).report
    assert [(f.count, f.first_rows, f.spoils) for f in report.faults] == [
        (1, ("rows.jsonl:4",), True)
    ]


def test_an_answer_cut_by_the_template_and_one_marked_untrained_are_left_out_by_name(
    smollm, tmp_path
):
    spoil(smollm, "message['content'] + '<", "message['content'][:90] + '<")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    long = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "long " * 20}]
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": m} for m in (good, long, turns, good)]
    report = prepare_data(recipe(write(tmp_path, rows), val_size=0), smollm).report
    assert {f.kind: f.first_rows for f in report.faults if f.action == "left out"} == {
        "answer rewritten by the chat template": ("rows.jsonl:2",),
        "no trained answer": ("rows.jsonl:3",),
    }


def test_held_out_rows_keep_their_tools_and_marks(smollm, tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
    turns = (
        Message("user", "a"),
        Message("assistant", "", {"tool_calls": [call], "reasoning_content": "hm"}),
        Message("tool", "b", {"tool_call_id": "x", "name": "f"}),
        Message("assistant", "c", train=False),
    )
    tools = ({"type": "function", "function": {"name": "f"}},)
    items = [Conversation(turns, Origin("rows.jsonl", 9), tools)]
    write_validation(tmp_path / "validation.jsonl", items)
    assert read_validation(tmp_path / "validation.jsonl") == items


def test_rows_with_reasoning_content_keep_thinking_on(family, tmp_path):
    said = {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, said]} for i in range(4)]
    prepared = prepare_data(recipe(write(tmp_path, rows)), family("qwen3", thinking=True))
    assert "thinking off" not in prepared.report.template
    assert "hm" in str(prepared.train_conversations[0].messages[1].extra)


# -- weights, strict, the cache ----------------------------------------------------------------


def test_a_weight_says_how_often_an_epoch_trains_on_a_row(smollm, tmp_path):
    one, two = write(tmp_path, GOOD[:10], "a.jsonl"), write(tmp_path, GOOD[10:], "b.jsonl")
    data = [{"source": one, "weight": 2.5}, {"source": two, "weight": 0.2}]
    made = prepare_data(recipe(data, val_size=0), smollm)
    seen = Counter(str(e.origin) for e in made.train)
    assert [seen[f"a.jsonl:{i}"] for i in range(1, 11)].count(3) == 5
    assert sum(n for row, n in seen.items() if row.startswith("a")) == 25
    assert sum(n for row, n in seen.items() if row.startswith("b")) == 6
    assert {(f.kind, f.action, f.count) for f in made.report.faults} == {
        ("weight 0.2", "not drawn", 24)
    }
    assert len(made.train_conversations) == made.report.rows_read == 40
    assert made.report.tokens_train == sum(len(e.input_ids) for e in made.train)
    again = prepare_data(recipe(data, val_size=0, strict=True), smollm)
    assert [e.origin for e in again.train] == [e.origin for e in made.train]


def test_held_out_rows_are_scored_once_whatever_their_weight(smollm, tmp_path):
    data = [{"source": write(tmp_path, GOOD), "weight": 3.0}]
    made = prepare_data(recipe(data, val_size=4), smollm)
    assert (len(made.train), len(made.val)) == (3 * 36, 4)


def test_strict_stops_at_what_would_only_be_counted(smollm, tmp_path):
    path = write(tmp_path, [*GOOD, {"question": "b"}, GOOD[3]])
    assert counts(prepare_data(recipe(path), smollm).report) == {
        "no answer": 1,
        "exact duplicate": 1,
    }
    with pytest.raises(DataError, match=r"(?s)strict: .*1 x no answer \(rows.jsonl:41\)"):
        prepare_data(recipe(path, strict=True), smollm)
    prepare_data(recipe(path, strict=True), smollm, inspecting=True)


def test_a_second_run_tokenizes_nothing_until_a_rule_or_the_tokenizer_changes(
    smollm, tmp_path, monkeypatch
):
    path = write(tmp_path, GOOD)
    first = prepare_data(recipe(path), smollm)
    encoded = []
    real = module.encode_many
    monkeypatch.setattr(module, "encode_many", lambda *a: encoded.append(a) or real(*a))
    again = prepare_data(recipe(path), smollm)
    assert (list(again.train), list(again.val)) == (list(first.train), list(first.val))
    assert again.report == first.report
    prepare_data(recipe(path, val_size=0.5, seed=7), smollm)
    assert not encoded
    prepare_data(recipe(path, train_on="all"), smollm)
    prepare_data(recipe(path, cutoff_len=64), smollm)
    smollm.chat_template += "{# other #}"
    prepare_data(recipe(path), smollm)
    assert len(encoded) == 3


def test_content_whose_hash_is_known_only_when_read_is_tokenized_once(
    smollm, tmp_path, monkeypatch
):
    """As of addresses and hub data: rows are read again, but not tokenized."""
    monkeypatch.setattr("lorakit.data.conversations.content_key", lambda *_: None)
    made = []
    real = module.encode_many
    monkeypatch.setattr(module, "encode_many", lambda *a: made.append(a) or real(*a))
    path = write(tmp_path, [*GOOD, {"question": "network"}])
    first, again = (prepare_data(recipe(path), smollm) for _ in range(2))
    assert len(made) == 1
    assert list(first.train) == list(again.train)
    write(tmp_path, GOOD[1:])
    prepare_data(recipe(path), smollm)
    assert len(made) == 2


def test_a_spoiled_row_that_inspect_has_kept_still_stops_a_run(smollm, tmp_path):
    path = write(tmp_path, GOOD)
    smollm.chat_template = smollm.chat_template.replace(
        "'<|im_end|>'", "('' if message['content'] == '6' else '<|im_end|>')"
    )
    seen = prepare_data(recipe(path, val_size=0), smollm, inspecting=True)
    assert [f.spoils for f in seen.report.faults] == [True]
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows.jsonl:4"):
            prepare_data(recipe(path, val_size=0), smollm)


def test_texts_say_how_they_are_trained(smollm, tmp_path):
    (tmp_path / "a.md").write_text("# One\n\nText of it.\n\n# Two\n\nMore text.")
    for mode, start in (("completion", "trained as plain text"), ("instruction", "each piece")):
        made = prepare_data(recipe(str(tmp_path / "a.md"), val_size=0, documents=mode), smollm)
        assert made.report.sources[0]["documents"].startswith(start)
    assert "Write the section" in smollm.decode(made.train[0].input_ids)


CELL = st.none() | st.integers() | st.text(max_size=12) | st.sampled_from(["<|im_end|>", "\u2028"])
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "gpt", "x"]), "content": CELL}
)
ROWS = st.one_of(
    st.lists(st.fixed_dictionaries({"question": CELL, "answer": CELL}), min_size=1, max_size=6),
    st.lists(st.fixed_dictionaries({"messages": st.lists(TURN, max_size=5)}), max_size=6),
    st.lists(st.dictionaries(st.sampled_from(["text", "question", "answer"]), CELL), max_size=6),
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(ROWS, st.sampled_from([0, 0.5, 1]), st.sampled_from([12, 40, 2048]))
def test_rows_in_are_rows_kept_and_rows_reported(smollm, tmp_path, rows, val_size, cutoff):
    try:
        made = prepare_data(
            recipe(write(tmp_path, rows), val_size=val_size, cutoff_len=cutoff), smollm
        )
    except LorakitError:
        return
    left_out = sum(f.count for f in made.report.faults if f.action == "left out")
    kept = {str(c.origin) for c in (*made.train_conversations, *made.val_conversations)}
    assert made.report.rows_read == len(rows) == len(kept) + left_out
    for item in (*made.train_conversations, *made.val_conversations):
        assert isinstance(item, Conversation | Document)
