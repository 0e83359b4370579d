"""A pair is one example whose two sequences are those of supervised training."""

import io

import pytest
from rich.console import Console
from tests.preferences import pairs, write_rows

from lorakit.data.inspection import shown_example
from lorakit.data.issues import IssueLog, RowError
from lorakit.data.prepare import prepare_data
from lorakit.data.tokenize.encode import EncodeConfig, encode, encode_many
from lorakit.display.inspection_view import example_view
from lorakit.errors import DataError
from lorakit.recipe.schema import Recipe
from lorakit.types import IGNORE, Conversation, Message, Origin

ORIGIN = Origin("rows.jsonl", 1)


def chat(*texts, train=True):
    roles = ("user", "assistant")
    return tuple(Message(roles[i % 2], t, train=train or i % 2 == 0) for i, t in enumerate(texts))


def pair_of(chosen, rejected, start=()):
    head = chat(*start, train=False)
    sides = ((*head, *chat("Which one?", answer)) for answer in (chosen, rejected))
    messages, other = sides
    return Conversation(messages, ORIGIN, rejected=other)


def encoded(tokenizer, pair, cutoff=512, overlength="drop_oldest_turns"):
    log = IssueLog()
    rules = EncodeConfig("responses", cutoff, overlength)
    ((item, result),) = encode_many(tokenizer, [pair], rules, log)
    assert item == pair
    return result, log


def test_both_sequences_are_those_of_supervised_training(tokenizer):
    pair = pair_of("This one, of course.", "None.")
    (example,), _ = encoded(tokenizer, pair)
    for sequence, messages in zip(example.sequences, (pair.messages, pair.rejected), strict=True):
        (alone,) = encode(tokenizer, Conversation(messages, ORIGIN))
        assert (sequence.input_ids, sequence.labels) == (alone.input_ids, alone.labels)
    assert example.second == len(example.sequences[0].input_ids)
    assert example.trained_tokens == sum(s.trained_tokens for s in example.sequences)


def test_answers_of_the_prompt_are_not_trained(tokenizer):
    pair = pair_of("This one.", "None.", start=("Hello?", "Hi."))
    (example,), _ = encoded(tokenizer, pair)
    for sequence, text in zip(example.sequences, ("This one.", "None."), strict=True):
        trained = [label for label in sequence.labels if label != IGNORE]
        assert tokenizer.decode(trained) == f"{text}<|im_end|>"


def test_the_oldest_turns_of_both_are_dropped_together(tokenizer):
    start = ("Hello there, how are you today?", "Very well.", "And the weather?", "Fine.")
    pair = pair_of("This one. " * 4, "None.", start)
    (whole,), _ = encoded(tokenizer, pair)
    limit = len(whole.sequences[0].input_ids) - 1
    (shorter,), log = encoded(tokenizer, pair, limit)
    lengths = [len(sequence.input_ids) for sequence in shorter.sequences]
    assert max(lengths) <= limit
    starts = [next(i for i, x in enumerate(s.labels) if x != IGNORE) for s in shorter.sequences]
    assert starts[0] == starts[1]
    assert (
        shorter.sequences[0].input_ids[: starts[0]] == shorter.sequences[1].input_ids[: starts[1]]
    )
    assert [(f.kind, f.action) for f in log.faults()] == [("too long", "oldest turns dropped")]
    for overlength in ("drop", "split"):
        fault, _ = encoded(tokenizer, pair, limit, overlength)
        assert isinstance(fault, RowError)
        assert fault.kind == "too long"


def test_an_answer_that_cannot_fit_is_a_fault_and_is_never_cut(tokenizer):
    fault, _ = encoded(tokenizer, pair_of("This one. " * 40, "None."), 60)
    assert isinstance(fault, RowError)
    assert fault.kind == "too long"


def recipe_of(model, data, objective, **values):
    values = {"val_size": 0, "cutoff_len": 256, **values}
    return Recipe(model=str(model), data=str(data), objective=objective, **values)


def test_prepared_pairs_keep_their_order_and_count_both_sequences(
    tiny_model_dir, tokenizer, tmp_path
):
    rows = [*pairs(5), {"prompt": "A?", "chosen": "Same.", "rejected": "Same."}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    prepared = prepare_data(recipe_of(tiny_model_dir, data, "dpo"), tokenizer)
    report = prepared.report
    assert (report.rows_read, report.examples_train) == (6, 5)
    assert [(f.kind, f.count) for f in report.faults] == [("identical answers", 1)]
    longest = max(len(s.input_ids) for e in prepared.train for s in e.sequences)
    assert report.longest_example == longest < prepared.train.lengths.max()
    assert [e.origin.row for e in prepared.train] == [1, 2, 3, 4, 5]
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    other = prepare_data(
        recipe_of(tiny_model_dir, write_rows(tmp_path / "b.jsonl", swapped), "dpo"), tokenizer
    )
    assert prepared.train.digest() != other.train.digest()
    assert not set(prepared.train.content_hashes) & set(other.train.content_hashes)


def test_pairs_of_one_prompt_are_on_one_side_of_the_split(tiny_model_dir, tokenizer, tmp_path):
    rows = [
        {"prompt": f"Question {i // 4}?", "chosen": f"Good {i}.", "rejected": "Bad."}
        for i in range(40)
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = recipe_of(tiny_model_dir, data, "dpo", val_size=0.2)
    prepared = prepare_data(recipe, tokenizer)
    sides = [
        {c.messages[0].content for c in side}
        for side in (prepared.train_conversations, prepared.val_conversations)
    ]
    assert sides[1]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_data_of_the_other_objective_is_refused(objective, tiny_model_dir, tokenizer, tmp_path):
    rows = pairs(3) if objective == "sft" else [{"question": "A?", "answer": "B."}] * 3
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        prepare_data(recipe_of(tiny_model_dir, data, objective), tokenizer)
    wanted = "objective: dpo" if objective == "sft" else "objective: sft"
    assert wanted in f"{caught.value.message} {caught.value.hint}"


def test_a_pair_is_shown_side_by_side_with_its_prompt_once(tokenizer):
    (example,), _ = encoded(tokenizer, pair_of("This one.", "None at all."))
    shown = shown_example(tokenizer, example)
    assert "".join(p.text for p in shown.pieces[: shown.shared]).endswith("assistant\n")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(example_view(shown))
    text = console.export_text()
    assert text.count("Which one?") == 1
    (line,) = [line for line in text.splitlines() if "This one." in line]
    assert "⟦This one." in line
    assert "⟦None at all." in line
    assert text.index("chosen") < text.index("rejected") < text.index("⟦This one.")
