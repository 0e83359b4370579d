"""Sentences about prepared data that would make a poor run: its loss mask and repeated rows.

They state measured shares, what follows from them, and what to do. `inspect`, training, the report
and the page show the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.data.issues import (
    EXACT_DUPLICATE,
    INFO_ONLY,
    NEAR_DUPLICATE,
    OVERLAP,
    OVERLAP_NEAR,
)
from lorakit.recipe.schema import Recipe

# From this share of trained tokens on, the questions must be among them; below the other one,
# a step learns from almost nothing.
NEARLY_ALL, HARDLY_ANY = 0.97, 0.02
REPEATED, TRAINED_ON = (EXACT_DUPLICATE, NEAR_DUPLICATE), (OVERLAP, OVERLAP_NEAR)
# Share of rows from which on a fault changes the result.
MANY = 0.1


def data_notes(report: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Notes on a data report (`DataReport.as_dict()`, data_report.json), the gravest first."""
    notes = _mask_notes(report, recipe)
    sides = (report["examples_train"] + report["examples_val"], report["examples_val"])
    faults = [fault for fault in report["faults"] if fault["action"] not in INFO_ONLY]

    def rows_of(*kinds: str) -> int:
        return sum(fault["count"] for fault in faults if fault["kind"] in kinds)

    repeated, trained = rows_of(*REPEATED), rows_of(*TRAINED_ON)
    if repeated >= MANY * sides[0]:
        notes.append(
            f"Duplicated data: {_share(repeated, sides[0])} of the rows ({repeated:,}) repeat "
            "another row, so that the model memorizes them. Remove them from the data."
        )
    if trained and trained >= MANY * sides[1]:
        notes.append(
            f"Held-out rows are trained on: {_share(trained, sides[1])} of them ({trained:,}) are "
            "in the training data, too. Their loss and scores do not measure new questions; hold "
            "out other rows."
        )
    rows = report.get("rows_read") or sides[0]  # old reports lack it
    return notes + [
        f"{_share(fault['count'], rows)} of the rows: {fault['kind']}: {fault['action']}."
        for fault in faults
        if fault["kind"] not in REPEATED + TRAINED_ON and fault["count"] >= MANY * rows
    ]


def _mask_notes(report: Mapping[str, Any], recipe: Recipe) -> list[str]:
    trained, tokens = report["trained_tokens_train"], report["tokens_train"]
    share = trained / max(1, tokens)
    if recipe.objective == "grpo":  # prompts are read; what is trained is sampled
        return []
    if share > NEARLY_ALL and recipe.train_on == "all":
        return [
            f"Loss mask: {share:.0%} of the tokens are trained, questions included, since train_on "
            "is `all`: the model learns to write questions as well. Set train_on: responses to "
            "train the answers alone."
        ]
    if share > NEARLY_ALL:
        formats = sorted({str(source["format"]) for source in report["sources"]})
        return [
            f"Loss mask: {share:.0%} of the tokens are trained. The rows were read as "
            f"{', '.join(formats)}, in which no question is recognized; to train answers alone, "
            "give questions and answers in columns of their own."
        ]
    if share < HARDLY_ANY:
        return [
            f"Loss mask: only {share:.1%} of the tokens are trained, so that a step learns from "
            "little. Look at the examples token by token."
        ]
    return []


def _share(count: int, total: int) -> str:
    return f"{min(1.0, count / max(1, total)):.0%}"
