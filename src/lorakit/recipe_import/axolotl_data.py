"""The data sets of an Axolotl recipe enter; our `data`, `columns` and `val_data` leave.

What a data set's `type` would do beyond that is said in lines of its own.
"""

from __future__ import annotations

from typing import Any

from lorakit.recipe_import.rules import Draft, Said, Unfit, hub_id, is_on

OWN_TEMPLATE = "the model's own chat template is used; see `lorakit inspect`"
# Types by which Axolotl puts words of its own around a question.
WORDED = (
    "alpaca", "gpteacher", "oasst", "reflection", "explainchoice", "concisechoice", "context_qa",
    "summarizetldr", "jeopardy", "creative_acr", "pygmalion", "metharme", "orcamini", "stepwise",
    "llama2_chat",
)  # fmt: skip
# The parts of a custom `type` -> ours.
PARTS = {
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "response",
    "field_system": "system",
}
UNREAD = ("shards", "preprocess_shards", "revision", "drop_system_message", "step_separator")


def template(value: Any, draft: Draft) -> Said:
    """`chat_template`: the tokenizer's own is ours too."""
    if str(value).startswith("tokenizer_default"):
        return Said("own", note=OWN_TEMPLATE)
    note = f"{value}: {OWN_TEMPLATE}; to train another, put it into the tokenizer"
    return Said("left", note=note)


def datasets(value: Any, draft: Draft) -> Said:
    """`datasets`: one source for each; what is said of it comes as lines of its own."""
    entries = value if isinstance(value, list) else [value]
    sources, columns = [], []
    for at, entry in enumerate(entries):
        if not isinstance(entry, dict) or not entry.get("path"):
            raise Unfit(f"entry {at + 1} has no `path`: write `data` yourself")
        sources += _sources(entry, f"datasets[{at}]", draft)
        columns.append(_columns(entry, f"datasets[{at}]", draft))
    values: dict[str, Any] = {"data": sources[0] if len(sources) == 1 else sources}
    if any(part != columns[0] for part in columns):
        draft.leave(
            "columns",
            "the data sets name their columns differently, and `columns` is one for all: rename "
            "them in the files",
        )
    elif columns[0]:
        values["columns"] = columns[0]
    return Said("taken", values)


def texts(value: Any, draft: Draft) -> Said:
    """`pretraining_dataset`: texts that are trained as they stand."""
    entries = value if isinstance(value, list) else [value]
    first = entries[0] if isinstance(entries[0], dict) else {"path": entries[0]}
    if len(entries) > 1 or not first.get("path"):
        raise Unfit("one source with a `path` is read: write `data` yourself")
    column = str(first.get("text_column") or "text")
    source = hub_id(first["path"], first.get("name"), first.get("split"))
    columns = {} if column == "text" else {"columns": {"text": column}}
    return Said("taken", {"data": source, "documents": "completion", **columns})


def held_out_data(value: Any, draft: Draft) -> Said:
    """`test_datasets`: one source."""
    entries = value if isinstance(value, list) else [value]
    if len(entries) != 1 or not isinstance(entries[0], dict) or not entries[0].get("path"):
        raise Unfit("`val_data` is one source: put the files into one folder")
    sources = _sources(entries[0], "test_datasets[0]", draft)
    return Said("taken", {"val_data": sources[0]})


def _sources(entry: dict[str, Any], place: str, draft: Draft) -> list[str]:
    path, files = str(entry["path"]), entry.get("data_files")
    files = [files] if isinstance(files, str) else files or []
    if files and path.lower() in ("json", "csv", "parquet", "text"):
        return [str(f) for f in files]
    if files:
        note = "single files of a hub data set cannot be named: download them and name those"
        draft.leave(f"{place}.data_files", note)
    for key in UNREAD:
        if is_on(entry.get(key)):
            draft.leave(f"{place}.{key}", "not read by lorakit")
    return [hub_id(path, entry.get("name"), entry.get("split"))]


def _columns(entry: dict[str, Any], place: str, draft: Draft) -> dict[str, str]:
    """Our parts for its columns, and a line on what its `type` would do."""
    kind, place_of_type = entry.get("type"), f"{place}.type"
    found: dict[str, str] = {}
    if isinstance(kind, dict):
        found = {ours: str(kind[its]) for its, ours in PARTS.items() if is_on(kind.get(its))}
        words = ("format", "no_input_format", "system_format", "system_prompt")
        written = [key for key in words if kind.get(key)]
        if written:
            draft.leave(place_of_type, f"{', '.join(written)}: {OWN_TEMPLATE}")
    elif str(kind).startswith(WORDED):
        note = f"{kind}: rows are found by their columns, but no words are put around them"
        draft.leave(place_of_type, f"{note}: {OWN_TEMPLATE}")
    elif kind in ("completion", "pretrain"):
        found = {"text": str(entry["field"])} if entry.get("field") else {}
        draft.say(place_of_type, Said("taken", {"documents": "completion"}))
    elif str(kind).startswith(("chat_template", "sharegpt")):
        draft.say(place_of_type, Said("own", note="turns are found by their columns"))
        column = str(entry.get("field_messages") or "messages")
        found = {} if column in ("messages", "conversations") else {"messages": column}
    else:
        draft.leave(place_of_type, f"{kind}: not known here; see `lorakit inspect`")
    _turns(entry, place, draft)
    return found


def _turns(entry: dict[str, Any], place: str, draft: Draft) -> None:
    """Lines on what a chat data set says of its turns and is not the same here."""
    mapping = entry.get("message_property_mappings")
    mapping = mapping if isinstance(mapping, dict) else {}
    keys = ("message_field_role", "message_field_content")
    names = {*(entry.get(k) for k in keys), mapping.get("role"), mapping.get("content")}
    if names - {None, "role", "content", "from", "value"}:
        note = "a turn has role and content, or from and value: rename them in the file"
        draft.leave(f"{place}.message_property_mappings", note)
    if set(entry.get("roles_to_train") or ["assistant"]) - {"assistant", "gpt"}:
        note = "answers are trained, or everything with `train_on: all`"
        draft.leave(f"{place}.roles_to_train", note)
    if entry.get("train_on_eos") not in (None, "turn"):
        draft.leave(f"{place}.train_on_eos", "the end of each trained answer is trained")
    if entry.get("field_thinking") not in (None, "reasoning_content", "thinking"):
        note = "thoughts stand between <think> and </think>, or in reasoning_content or thinking"
        draft.leave(f"{place}.field_thinking", note)
    for key in ("message_field_training", "message_field_training_detail"):
        if is_on(entry.get(key)) and entry[key] != "train":
            draft.leave(f"{place}.{key}", 'a turn with "train": false is not trained: rename')
    if is_on(entry.get("chat_template")):
        draft.say(f"{place}.chat_template", template(entry["chat_template"], draft))
