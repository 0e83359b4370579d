"""Each format is found by its columns and becomes the same turns."""

import pytest

from lorakit.data.formats.columns import ColumnWatch
from lorakit.data.formats.row_formats import FORMATS, guess_format, to_conversation
from lorakit.data.issues import RowError
from lorakit.errors import DataError
from lorakit.types import Conversation, Document, Origin, Row

ASK, SAY = "What is 6 x 7?", "42"
PLAIN = [("user", ASK), ("assistant", SAY)]
TURNS = [{"role": "user", "content": ASK}, {"role": "assistant", "content": SAY}]

EXAMPLES = {
    "messages": (TURNS and {"messages": TURNS}, PLAIN),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": SAY}]},
        PLAIN,
    ),
    "gemini": (
        {
            "systemInstruction": {"parts": [{"text": "Be brief."}]},
            "contents": [
                {"role": "user", "parts": [{"text": ASK}]},
                {"role": "model", "parts": [{"text": SAY}]},
            ],
        },
        [("system", "Be brief."), *PLAIN],
    ),
    "dolly": (
        {"instruction": ASK, "context": "See: 42.", "response": SAY},
        [("user", ASK + "\n\nSee: 42."), ("assistant", SAY)],
    ),
    "instruction/response": (
        {"instruction": ASK, "response": SAY, "system": "Be brief."},
        [("system", "Be brief."), *PLAIN],
    ),
    "alpaca": (
        {"instruction": "Compute.", "input": "6 x 7", "output": SAY},
        [("user", "Compute.\n\n6 x 7"), ("assistant", SAY)],
    ),
    "prompt/completion": ({"prompt": ASK, "completion": SAY}, PLAIN),
    "prompt/response": ({"prompt": ASK, "response": SAY}, PLAIN),
    "question/answer": ({"question": ASK, "answer": SAY}, PLAIN),
    "query/response": (
        {"query": ASK, "response": SAY, "history": [["Hi", "Hello"]]},
        [("user", "Hi"), ("assistant", "Hello"), *PLAIN],
    ),
    "input/output": ({"input": ASK, "output": SAY}, PLAIN),
}


def row(values, number=1):
    return Row(values, Origin("rows.jsonl", number))


def convert(values, columns=None, system=None):
    guess = guess_format([row(values)], columns)
    return guess, to_conversation(row(values), guess, system)


def turns(item):
    return [(m.role, m.content) for m in item.messages]


def test_every_format_has_an_example_here():
    assert {f.name for f in FORMATS} == {*EXAMPLES, "text"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_format_is_found_and_converted(name):
    values, expected = EXAMPLES[name]
    guess, item = convert(values)
    assert guess.name == name
    assert "all of the first 1 rows" in guess.reason
    assert turns(item) == expected


def test_text_becomes_a_document():
    guess, item = convert({"text": "Once upon a time."})
    assert (guess.name, item) == ("text", Document("Once upon a time.", Origin("rows.jsonl", 1)))


def test_prompt_and_completion_may_be_lists_of_turns():
    _, item = convert({"prompt": TURNS[:1], "completion": TURNS[1:]})
    assert turns(item) == PLAIN


@pytest.mark.parametrize("prompt", [ASK, TURNS[:1]], ids=["text", "turns"])
@pytest.mark.parametrize("completion", [SAY, TURNS[1:]], ids=["text", "turns"])
def test_the_other_columns_of_prompt_and_completion_are_read_in_either_form(prompt, completion):
    _, item = convert({"prompt": prompt, "completion": completion})
    assert turns(item) == PLAIN
    more = {"system": "S", "history": [["Hi", "Hello"]], "tools": [{"name": "find"}]}
    guess, item = convert({"prompt": prompt, "completion": completion, **more})
    assert guess.name == "prompt/completion"
    assert turns(item) == [("system", "S"), ("user", "Hi"), ("assistant", "Hello"), *PLAIN]
    assert [tool["function"]["name"] for tool in item.tools] == ["find"]
    own = [{"role": "system", "content": "Own."}, *TURNS[:1]]
    _, item = convert({"prompt": own, "completion": completion, "system": "Own."})
    assert turns(item) == [("system", "Own."), *PLAIN]
    with pytest.raises(RowError, match="column system has 'S', and the first turn"):
        convert({"prompt": own, "completion": completion, "system": "S"})


def test_optional_columns_may_be_null_or_empty():
    for empty in (None, ""):
        _, item = convert({"instruction": ASK, "input": empty, "output": SAY, "system": empty})
        assert turns(item) == PLAIN


def test_the_system_of_the_recipe_yields_to_the_row():
    _, item = convert({"question": ASK, "answer": SAY}, system="Recipe.")
    assert turns(item)[0] == ("system", "Recipe.")
    _, item = convert({"question": ASK, "answer": SAY, "system": "Row."}, system="Recipe.")
    assert turns(item)[0] == ("system", "Row.")


def test_columns_rename_first_and_win():
    values = {"q": ASK, "a": SAY, "text": "not this", "response": "nor this"}
    guess, item = convert(values, {"instruction": "q", "response": "a"})
    assert (guess.name, turns(item)) == ("instruction/response", PLAIN)
    assert "text" not in guess.used


def test_a_column_that_was_renamed_is_read_once():
    """`input` would be a context below the question, were it not the question itself."""
    values = {"input": ASK, "output": SAY}
    guess, item = convert(values, {"instruction": "input", "response": "output"})
    assert (guess.name, turns(item)) == ("instruction/response", PLAIN)


def test_columns_decide_where_another_format_would_fit_as_it_is():
    other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    values = {"messages": other, "prompt": "x", "completion": "y", "q": ASK, "a": SAY}
    guess, item = convert(values, {"question": "q", "answer": "a"})
    assert (guess.name, turns(item)) == ("question/answer", PLAIN)


def test_unknown_columns_are_listed_with_a_line_to_try():
    with pytest.raises(DataError, match=r"the columns are my_question, my_answer, id") as caught:
        convert({"my_question": ASK, "my_answer": SAY, "id": 3})
    assert "missing instruction, response" in caught.value.message
    assert "columns: {instruction: my_question, response: my_answer}" in caught.value.hint


def test_a_missing_part_of_the_nearest_format_is_named():
    with pytest.raises(DataError, match=r"nearest format: instruction/response, missing response"):
        convert({"instruction": ASK, "reply": SAY})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"instruction": "quest"},
            r"no column 'quest' for instruction \(found: question, answer\)",
        ),
        ({"question": "instruction"}, "no column 'instruction'"),
        ({"foo": "question"}, r"'foo' is not a part of a row"),
    ],
)
def test_wrong_columns_are_explained(columns, message):
    with pytest.raises(DataError, match=message):
        convert({"question": ASK, "answer": SAY}, columns)


def test_preference_data_is_refused_with_a_sentence():
    with pytest.raises(DataError, match="preference data"):
        convert({"prompt": ASK, "chosen": SAY, "rejected": "41"})
    with pytest.raises(DataError) as caught:
        convert({"chosen": TURNS, "rejected": TURNS})
    assert caught.value.hint.endswith("columns: {messages: chosen}")
    _, item = convert(
        {"prompt": ASK, "chosen": SAY, "rejected": "41"},
        {"instruction": "prompt", "response": "chosen"},
    )
    assert turns(item) == PLAIN


def test_a_format_must_fit_some_row_and_the_odd_row_is_a_fault():
    rows = [row({"question": ASK, "answer": SAY}, n) for n in range(1, 4)]
    odd = row({"instruction": ASK, "response": SAY}, 4)
    guess = guess_format([*rows, odd])
    reason = "columns question, answer in 3 of the first 4 rows; confidence 75%"
    assert (guess.reason, guess.confidence) == (reason, 0.75)
    with pytest.raises(RowError, match=r"rows.jsonl:4: this row is of format instruction/resp"):
        to_conversation(odd, guess, None)
    with pytest.raises(RowError, match=r"rows.jsonl:5: column question is missing"):
        to_conversation(row({"answer": SAY}, 5), guess, None)


@pytest.mark.parametrize(
    "names", [["What is 1 + 1?", "2"], ["How tall is the mountain near the lake", "tall."]]
)
def test_a_table_without_a_header_is_suspected(names):
    values = dict.fromkeys(names, "x")
    with pytest.raises(DataError) as caught:
        guess_format([row(values, 2), row(values, 3)])
    assert "if the first line is a row already" in caught.value.hint


def test_rows_of_a_conversation_keep_their_origin():
    _, item = convert({"question": ASK, "answer": SAY})
    assert isinstance(item, Conversation)
    assert str(item.origin) == "rows.jsonl:1"


def test_two_formats_that_fit_alike_are_told_and_halve_the_confidence():
    both = {"question": ASK, "answer": SAY, "instruction": "Do it.", "output": "done"}
    guess, _ = convert(both)
    assert (guess.name, guess.confidence) == ("alpaca", 0.5)
    assert "question/answer would fit too: `columns` decides; confidence 50%" in guess.reason


def test_content_parts_system_and_tools_of_the_usual_forms():
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "6 x 7?"}]
    _, item = convert({"messages": [{"role": "user", "content": parts}, TURNS[1]]})
    assert turns(item) == PLAIN
    tools = '[{"name": "find", "parameters": {"type": "object", "properties": {}}}]'
    chat = EXAMPLES["sharegpt"][0] | {"system": "S", "tools": tools}
    _, item = convert(chat)
    assert turns(item) == [("system", "S"), *PLAIN]
    assert item.tools[0]["function"]["name"] == "find"


@pytest.mark.parametrize("column", ["image", "images", "video", "audios"])
def test_a_row_with_an_image_is_refused_by_name_and_one_without_is_not(column):
    row = Row({"messages": TURNS, column: ["cat.jpg"]}, Origin("rows.jsonl", 3))
    guess = guess_format([row])
    with pytest.raises(RowError, match=rf"rows.jsonl:3.*{column} holds \['cat.jpg'\]") as caught:
        to_conversation(row, guess, None)
    assert f"remove {column}" in caught.value.hint
    for empty in (None, [], ""):
        row = Row({"messages": TURNS, column: empty}, Origin("rows.jsonl", 4))
        assert to_conversation(row, guess, None).messages[-1].content == SAY


def test_messages_of_people_are_not_taken_for_plain_texts():
    slack = {"type": "message", "text": "Hi", "user": "U1", "ts": "1.0", "client_msg_id": "x"}
    for values, said in ((slack, "export of Slack"), ({"sender": "A", "text": "Hi"}, "one turn a")):
        rows = [Row(values, Origin("chat.json", 1))]
        with pytest.raises(DataError) as caught:
            guess_format(rows)
        assert said in caught.value.hint
        assert "missing )" not in caught.value.message
        assert guess_format(rows, {"text": "text"}).name == "text"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"system": "S", "chat": "USER: a ASSISTANT: b"}, "rows of Glaive: split `chat`"),
        ({"id": "1", "data": ["Why?", "So."]}, "data is a list of texts without roles"),
    ],
)
def test_well_known_rows_without_a_format_are_named(values, said):
    with pytest.raises(DataError) as caught:
        guess_format([Row(values, Origin("rows.jsonl", 1))])
    assert said in caught.value.hint


def test_a_column_without_a_name_is_listed_as_such():
    watch = ColumnWatch(("q", "a"), {}, None)
    watch.check(Row({"q": "x", "a": "y", "": "7", "note": "z"}, Origin("x.csv", 2)))
    assert watch.unused == ["(no name)", "note"]
