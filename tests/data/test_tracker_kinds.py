"""Files that people brought to other tools, rebuilt small: read rightly, or told for what they are.

Each case cites the public report (owner/repository#number) or the documentation that it follows.
"""

import json

import pytest

from lorakit.data.conversations import read_conversations
from lorakit.errors import DataError
from lorakit.recipe.schema import Recipe
from lorakit.types import Document

ASK, SAY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
PLAIN = [("user", "Why?", True), ("assistant", "So.", True)]
CHAT = {"messages": [ASK, SAY]}
OPTIONS = {"question": "Which is red?", "options": ["fire", "ice"], "answer": "A"}


def read(tmp_path, text, name="rows.jsonl"):
    path = tmp_path / name
    if isinstance(text, list):
        text = "".join(json.dumps(row) + "\n" for row in text)
    path.write_text(text, encoding="utf-8")
    items, log = read_conversations([str(path)], Recipe(model="demo", data=str(path)), [])
    found = [
        item.text
        if isinstance(item, Document)
        else [(m.role, m.content, m.train) for m in item.messages]
        for item in items
    ]
    return found, [fault.kind for fault in log.faults()], items.meta["lines"][0]["columns_not_used"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # mozilla-ai/any-llm#1232: Anthropic's system text as blocks, with a cache mark
        (
            CHAT | {"system": [{"type": "text", "text": "Be", "cache_control": {"type": "x"}}]},
            [("system", "Be", True), *PLAIN],
        ),
        # Bedrock's conversations: parts without a type
        (
            {
                "system": [{"text": "Be"}],
                "messages": [{"role": "user", "content": [{"text": "Why?"}]}, SAY],
            },
            [("system", "Be", True), *PLAIN],
        ),
        # The same under another name, however short
        (CHAT | {"system_prompt": "Be"}, [("system", "Be", True), *PLAIN]),
        # verl-project/verl#3507: a mask for each turn, in a column beside them
        (
            {"messages": [ASK, SAY, ASK, SAY], "loss_mask": [0, 0, 0, 1]},
            [PLAIN[0], ("assistant", "So.", False), *PLAIN],
        ),
        # verl-project/verl#5316: a mask for each answer
        (
            {"messages": [ASK, SAY, ASK, SAY], "loss_mask": [1, 0]},
            [*PLAIN, PLAIN[0], ("assistant", "So.", False)],
        ),
        # meta-pytorch/torchtune#1504: the text of a part under `content`
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "content": "Why?"}]}, SAY]},
            PLAIN,
        ),
        # Cohere's and OpenAssistant's names of roles
        ({"messages": [ASK | {"role": "User"}, SAY | {"role": "Chatbot"}]}, PLAIN),
        ({"messages": [ASK | {"role": "prompter"}, SAY]}, PLAIN),
        # Earlier turns as messages, not as pairs
        (
            {"history": [ASK, SAY], "query": "Why?", "response": "So."},
            [*PLAIN, *PLAIN],
        ),
        # huggingface/datasets#4467: the text null is no missing value
        ({"prompt": "Null in German?", "completion": "null"},
         [("user", "Null in German?", True), ("assistant", "null", True)]),
        # hiyouga/LLaMA-Factory's history, as a table or a log store keeps it
        (
            {"history": json.dumps([["Why?", "So."]]), "query": "Why?", "response": "So."},
            [*PLAIN, *PLAIN],
        ),
        ({"history": "[]", "query": "Why?", "response": "So."}, PLAIN),
        # Options that the question shows need no column
        (
            OPTIONS | {"question": "Which is red, fire or ice?"},
            [("user", "Which is red, fire or ice?", True), ("assistant", "A", True)],
        ),
    ],
)  # fmt: skip
def test_it_is_read_as_it_was_meant(tmp_path, row, expected):
    found, faults, _ = read(tmp_path, [row, row | {"id": 2}])
    assert [found[0], faults] == [expected, ["exact duplicate"] if len(found) == 1 else []]


@pytest.mark.parametrize(
    ("rows", "message", "hint"),
    [
        # axolotl-ai-cloud/axolotl#1945: ids and labels of another tokenizer, with or without text
        ([{"input_ids": [1], "labels": [1]}], "no known format", "tokenized already"),
        ([{"text": "a b", "input_ids": [1], "labels": [1]}], "no known", "tokenized already"),
        # axolotl-ai-cloud/axolotl#1661
        ([{"segments": [{"label": True, "text": "a"}]}], "no known format", "input_output"),
        # hiyouga/LlamaFactory#3803: answers judged by `kto_tag`
        ([CHAT | {"kto_tag": True}, CHAT | {"kto_tag": False}], "'kto_tag' judges", "keep only"),
        # A verdict under any name
        ([CHAT | {"status": s} for s in ("approved", "rejected")], "'status' judges", "keep only"),
        # unslothai/unsloth#2095: turns as Python writes them, under a name of one's own
        ([{"traj": str([ASK, SAY])}], "no known format", "{messages: traj} after writing it with"),
        ([{"traj": json.dumps([ASK, SAY])}], "no known format", "columns: {messages: traj}"),
        # NovaSky-AI/SkyRL#1675: calls and schemas, which {response: answers} would lose
        ([{"query": "q", "answers": "[]", "tools": "[]"}], "no known format", "xLAM"),
        # felixbur/nkululeko#427: a column that holds rows out
        (
            [{"prompt": "q", "completion": "a", "split": s} for s in ("train", "evaluation")],
            "rows.jsonl:2: column 'split' says 'evaluation'",
            "columns: {prompt: prompt, completion: completion}",
        ),
        # MMLU and ARC: the options are part of the question
        ([OPTIONS], "rows.jsonl:1: column 'options' lists", "into the question"),
        (
            [{"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}],
            "no known format",
            "write the choices into the question",
        ),
        # Names that say which is the question, and names of which the first one is
        (
            [{"human": "q?", "bot": "a."}],
            "no known",
            "columns: {instruction: human, response: bot}",
        ),
        ([{"target": "a.", "source": "q?"}], "no", "columns: {instruction: source, response: tar"),
        ([{"en": "Why?", "de": "Warum?"}], "no", "columns: {instruction: en, response: de}"),
        ([{"question": "q", "answers": ["a", "b"]}], "no", "answers is a list of texts: write the"),
        # huggingface/trl's variables of the template, row by row
        (
            [CHAT | {"chat_template_kwargs": {"enable_thinking": False}}],
            "rows.jsonl:1: column 'chat_template_kwargs' sets the chat template of this row",
            "columns: {messages: messages}",
        ),
        (
            [CHAT | {"enable_thinking": False}],
            "'enable_thinking' sets",
            "template_kwargs in the re",
        ),
        # Weights of turns that no format reads
        ([CHAT | {"turn_weights": [0, 1]}], "'turn_weights' marks turns or tokens", "train: false"),
        # OpenAssistant's trees: one message a row, with a column `text`
        ([{"text": "Why?", "role": "prompter", "parent_id": None}], "no known", "one turn a row"),
        # Prompts for reinforcement learning, judged steps, results of batch APIs
        ([{"prompt": [ASK], "reward_model": {"ground_truth": "4"}}], "no known", "without answers"),
        ([{"prompt": "Why?"}], "no known format", "write each row as"),
        ([{"prompt": "q", "completions": ["a"], "labels": [True]}], "no known", "judged steps"),
        ([{"request": {}, "response": {}}], "no known format", "batch API"),
        ([{"dialogue": "User: Why?\nAssistant: So."}], "no known format", "a chat written as one"),
        (
            [{"dialogue": "Ada: hi\nBen: yo", "summary": "They greet."}],
            "no known format",
            "{instruction: dialogue, response: summary}",
        ),
    ],
)
def test_it_stops_with_what_it_is_and_what_to_do(tmp_path, rows, message, hint):
    with pytest.raises(DataError) as caught:
        read(tmp_path, rows)
    assert message in caught.value.message
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        # Spans of an answer in axolotl's conversations
        ({"messages": [ASK, SAY | {"train_detail": [{"begin_offset": 0, "train": False}]}]},
         "unknown weight"),
        # verl-project/verl#3507, of another length
        (CHAT | {"loss_mask": [0, 1, 1]}, "unknown weight"),
        (CHAT | {"loss_mask": 0}, "unknown weight"),
        ({"system": "Be a pirate.", "messages": [{"role": "system", "content": "Be"}, ASK, SAY]},
         "two system texts"),
    ],
)  # fmt: skip
def test_the_row_is_left_out_by_name(tmp_path, row, kind):
    found, faults, unused = read(tmp_path, [CHAT, row])
    assert (found, faults, unused) == ([PLAIN], [kind], [])


@pytest.mark.parametrize(
    "line",
    # adeshpande3/Facebook-Messenger-Bot#59: as iOS and as Android write it
    ["[20.06.19, 15:58:{:02}] Loris: Welcome, all of you", "6/20/19, 15:{:02} - John: Thanks"],
)
def test_a_chat_of_whatsapp_is_reported(tmp_path, line):
    text = "".join(line.format(i) + "\n" for i in range(6))
    found, faults, _ = read(tmp_path, text, "chat.txt")
    assert (found, faults) == ([text], ["a chat between people (WhatsApp)"])
    assert read(tmp_path, "On 20.06.19, 15:58 we left.\n" * 6, "log.txt")[1] == []


@pytest.mark.parametrize(
    "message",
    [
        {"sender_name": "Ada", "timestamp_ms": 1, "content": "caf\u00c3\u00a9"},
        {"id": "1", "content": "hello", "author": {"id": "1", "name": "Ada"}},
    ],
    ids=["MasterScrat/Chatistics#49 Messenger", "Discord"],
)
def test_a_chat_of_people_is_one_conversation_without_roles(tmp_path, message):
    export = {"participants": [{"name": "Ada"}], "messages": [message] * 2, "title": "x"}
    with pytest.raises(DataError, match="has the role null") as caught:
        read(tmp_path, json.dumps(export), "chat.json")
    assert "choose whose turns are the answers" in caught.value.hint


def test_a_table_written_by_columns_says_how_to_write_it(tmp_path):
    """hiyouga/LlamaFactory#2571: AgentInstruct through pandas."""
    turns = [
        {"from": "human", "loss": None, "value": "q"},
        {"from": "gpt", "loss": True, "value": "a"},
    ]
    with pytest.raises(DataError, match="column by column") as caught:
        read(tmp_path, json.dumps({"conversations": {"0": turns}, "id": {"0": "x"}}), "rows.json")
    assert "orient='records'" in caught.value.hint
    assert read(tmp_path, [{"conversations": turns}])[0] == [
        [("user", "q", True), ("assistant", "a", True)]
    ]


def test_a_list_of_rows_in_a_txt_file_is_read_as_rows(tmp_path):
    """hiyouga/LlamaFactory#3018."""
    rows = [{"instruction": "Why?", "input": "", "output": "So."}]
    assert read(tmp_path, json.dumps(rows, indent=2), "rows.txt")[0] == [PLAIN]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Q: Why?\nA: So.\n\nQ: Who?\nA: He.\n", "questions and answers in a text"),
        ("\n<!DOCTYPE html>\n<html><body>Log in</body></html>\n", "a web page"),
    ],
)
def test_a_text_that_is_more_than_that_is_reported(tmp_path, text, kind):
    found, faults, _ = read(tmp_path, text, "rows.txt")
    assert (found, faults) == ([text], [kind])
    assert read(tmp_path, "Q: one question?\nA: one.\n<html> is a tag\n", "rows.txt")[1] == []


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_saved_as_a_text_is_a_table(tmp_path, separator):
    text = f"question{separator}answer\nWhy?{separator}So.\n"
    assert read(tmp_path, text, "rows.txt")[0] == [PLAIN]
    prose = "The question, the answer and the input of a function.\nMore.\n"
    assert read(tmp_path, prose, "rows.txt")[0] == [prose]
    assert read(tmp_path, "question, answer me\n", "rows.txt")[0] == ["question, answer me\n"]
