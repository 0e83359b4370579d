"""Read the marks that leave an answer out of the loss, under the names that other tools use.

`train` is lorakit's own, `weight` OpenAI's, `training` axolotl's, `loss` ms-swift's, `loss_mask`
and `trainable` verl's, and `masked` torchtune's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.data.formats.cells import RowFields, shown_value
from lorakit.types import Role

# Name of a mark -> its value of a turn that is trained.
MARKS: dict[str, bool] = {
    "train": True,
    "training": True,
    "trainable": True,
    "loss": True,
    "loss_mask": True,
    "weight": True,
    "masked": False,
}
# Written on every turn by tools with one schema for all roles.
_ON_ALL_TURNS = ("loss_mask", "masked")
_VALUES = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
# Character ranges of a turn in axolotl.
PARTIAL = "train_detail"
# Numbers and flags that say nothing about the loss.
_NEUTRAL = ("id", "index", "idx", "turn", "time", "date", "token", "created", "length", "count")


def is_trained(cells: RowFields, turn: Mapping[str, Any], role: Role, path: str) -> bool:
    """Return False for a turn that a mark leaves out of the loss.

    Raises:
        RowError: a mark has another value, or two marks contradict each other.
    """
    if turn.get(PARTIAL):
        raise cells.fault(
            "unknown weight",
            f"{path}.{PARTIAL} marks parts of an answer, expected train: true or false",
            "an answer is trained as a whole, or not at all: split it, or remove the marks",
        )
    trained: set[bool] = set()
    for name, trained_value in MARKS.items():
        value = turn.get(name)
        if value is None or value != value:
            continue
        flag = _VALUES.get(str(value).strip().lower())
        if flag is None:
            kind = "unknown weight" if name == "weight" else "wrong type"
            raise cells.fault(
                kind,
                f"{path}.{name} is {shown_value(value)}, expected true or false (or 1 or 0)",
                "mark an answer as trained or not trained: 1 or 0",
            )
        if role == "assistant":
            trained.add(flag == trained_value)
        elif flag == trained_value and name not in _ON_ALL_TURNS:
            raise cells.fault("unknown weight", f"{path}: only assistant turns can be trained")
    if len(trained) == 2:
        names = " and ".join(name for name in MARKS if turn.get(name) is not None)
        raise cells.fault("unknown weight", f"{path}: {names} contradict each other")
    return False not in trained


def with_loss_mask(cells: RowFields, turns: list[Any]) -> list[Any]:
    """Give each turn its mark from a column `loss_mask`, which has one for each turn or answer.

    Raises:
        RowError: the column has another length, or is no list.
    """
    mask = cells.values.get("loss_mask")
    if mask is None:
        return turns
    answers = [i for i, turn in enumerate(turns) if _answers(turn)]
    marks: dict[int, Any] = {}
    if isinstance(mask, list) and len(mask) in (len(turns), len(answers)):
        places = range(len(turns)) if len(mask) == len(turns) else answers
        marks = dict(zip(places, mask, strict=True))
    else:
        raise cells.fault(
            "unknown weight",
            f"column loss_mask is {shown_value(mask)}, expected one mark for each of the "
            f"{len(turns)} turns or {len(answers)} answers",
            "mark the turns themselves: train: false",
        )
    return [{"loss_mask": marks[i], **turn} if i in marks else turn for i, turn in enumerate(turns)]


def _answers(turn: Any) -> bool:
    return isinstance(turn, dict) and str(turn.get("role", turn.get("from"))).lower() in _ANSWERING


def unknown_flags(values: Mapping[str, Any]) -> Iterator[str]:
    """Names of flags and numbers of assistant turns that have no known meaning."""
    seen: set[str] = set()
    for turns in values.values():
        for turn in turns if isinstance(turns, list) else ():
            if not isinstance(turn, dict) or turn.get("role", turn.get("from")) not in _ANSWERING:
                continue
            for name, value in turn.items():
                known = name in MARKS or any(word in str(name).lower() for word in _NEUTRAL)
                if isinstance(value, bool | int | float) and not known and name not in seen:
                    seen.add(name)
                    yield str(name)


_ANSWERING = ("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai")
