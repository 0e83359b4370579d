"""Rows of the training data are a Dataset that any trainer of TRL can read."""

from lorakit.data.batching import Layout
from lorakit.data.dataset import as_dataset
from lorakit.distributed.process_group import SINGLE_PROCESS, DistributedContext
from lorakit.train.step_inputs import step_inputs

from .faults import examples

LAYOUT = Layout(0, 2, 32, packed=False)


def test_a_dataset_holds_ids_labels_and_where_each_example_is_from():
    rows = examples([5, 9, 7])
    dataset = as_dataset(rows)
    assert len(dataset) == 3
    for number, example in enumerate(rows):
        found = dataset[number]
        assert found["input_ids"] == example.input_ids
        assert found["labels"] == example.labels
        assert (found["source"], found["row"]) == ("rows.jsonl", number + 1)
    assert dataset[[2, 0]]["input_ids"] == [rows[2].input_ids, rows[0].input_ids]


def test_a_step_counts_the_tokens_of_all_ranks_and_lays_out_its_own():
    rows = examples([5, 9, 7, 4])
    dataset = as_dataset(rows)
    step = step_inputs([dataset[i] for i in (3, 1, 0, 2)], LAYOUT, SINGLE_PROCESS)
    assert [e.origin.row for e in step.examples] == [4, 2, 1, 3]
    assert (step.tokens, step.supervised) == (25, 17)
    assert len(step.own.micro) == 2
    parts = [
        step_inputs([dataset[i] for i in range(4)], LAYOUT, DistributedContext(rank, 2, 2))
        for rank in range(2)
    ]
    assert [p.tokens for p in parts] == [25, 25]
    assert sum(p.own.tokens for p in parts) == 25
