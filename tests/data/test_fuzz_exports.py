"""Real exports, mutated: no row and no column with a meaning disappears without a word.

Each cell holds a word of its own. After preparation that word is in the tokens of its row, or its
column is listed as not used, or its row is reported, or the run was refused.
`benchmarks/fuzz.py exports` runs the same campaign with 10,000 inputs.
"""

import csv
import io
import itertools
import json
import random
import time
import traceback
from collections import Counter

from lorakit.data.prepare import prepare_data
from lorakit.errors import LorakitError
from lorakit.recipe.schema import Recipe

ROWS = 6
SHAPES = {
    "alpaca": ("instruction", "input", "output"),
    "alpaca with history": ("instruction", "input", "output", "system", "history"),
    "question and answer": ("question", "answer"),
    "with context": ("context", "question", "answer"),
    "dolly": ("instruction", "context", "response", "category"),
    "prompt and completion": ("prompt", "completion"),
    "openai": ("messages",),
    "anthropic": ("system", "messages"),
    "sharegpt": ("id", "conversations"),
    "turns of a prompt": ("prompt_turns", "completion_turns"),
    "text": ("text",),
}
TURNS = {"messages", "conversations", "history", "prompt_turns", "completion_turns"}
# Names that people give to columns; each has a meaning that must be used or reported.
NAMES = (
    "system", "system_prompt", "thinking", "reasoning", "label", "score", "rating", "chosen",
    "rejected", "id", "source", "category", "lang", "context", "input", "history", "tools",
    "weight", "votes", "answer_2", "explanation", "Question", "ANSWER", "Antwort", "user",
    "assistant", "train", "loss", "text", "title", "url", "split", "messages", "",
)  # fmt: skip


def word(rng):
    """A word that no tokenizer merges with its neighbors, and no other cell holds."""
    return "w" + "".join(rng.choice("bcdfghjk") for _ in range(9))


def cell(column, rng):
    """A cell of a column, and the words in it."""
    if column not in TURNS:
        made = word(rng)
        return f"{made} x.", [made]
    count = {"prompt_turns": 1, "completion_turns": 1}.get(column, rng.choice([2, 2, 4]))
    first = "assistant" if column == "completion_turns" else "user"
    roles = itertools.islice(
        itertools.cycle([first, "assistant" if first == "user" else "user"]), count
    )
    words = [word(rng) for _ in range(count)]
    if column == "history":
        return [[a, b] for a, b in zip(words[::2], words[1::2], strict=True)], words
    keys, names = ("role", "content"), {}
    if column == "conversations":
        keys, names = ("from", "value"), {"user": "human", "assistant": "gpt"}
    pairs = zip(roles, words, strict=True)
    return [{keys[0]: names.get(r, r), keys[1]: f"{w} y."} for r, w in pairs], words


def table(rng):
    """(rows, {column: words of its cells by row}) of one export, with mutations."""
    columns = list(SHAPES[rng.choice(list(SHAPES))])
    given = {c: c.removesuffix("_turns") for c in columns}
    for _ in range(rng.choice([0, 1, 1, 2, 3])):
        kind = rng.choice(["rename", "drop", "add", "swap"])
        if kind == "drop" and len(columns) > 1:
            columns.remove(rng.choice(columns))
        elif kind == "rename":
            given[rng.choice(columns)] = rng.choice(NAMES)
        elif kind == "add":
            name = rng.choice(NAMES)
            if name not in given.values():
                columns.append(f"extra {name}")
                given[columns[-1]] = name
        else:
            rng.shuffle(columns)
    names = [given[c] for c in columns]
    columns = [c for i, c in enumerate(columns) if given[c] not in names[:i]]
    rows, words = [], {given[c]: [] for c in columns}
    empty = rng.choice([0, 0, 0.3])
    for _ in range(ROWS):
        row = {}
        for column in columns:
            value, own = cell(column, rng)
            if column.startswith("extra") and rng.random() < empty:
                value, own = rng.choice([None, "", " "]), []
            row[given[column]] = value
            words[given[column]].append(own)
        rows.append(row)
    return rows, words


def as_csv(rows, delimiter, encoding="utf-8"):
    out = io.StringIO()
    flat = [
        {
            k: json.dumps(v) if isinstance(v, list) else ("" if v is None else v)
            for k, v in r.items()
        }
        for r in rows
    ]
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue().encode(encoding)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


FILES = {
    "rows.jsonl": lines,
    "rows.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "wrapped.json": lambda rows: json.dumps({"version": 1, "data": rows}).encode(),
    "rows.csv": lambda rows: as_csv(rows, ","),
    "semicolons.csv": lambda rows: as_csv(rows, ";"),
    "rows.tsv": lambda rows: as_csv(rows, "\t"),
    "utf16.csv": lambda rows: as_csv(rows, ",", "utf-16"),
    "rows.txt": lines,
    "inside.jsonl": lambda rows: lines([{"row": row} for row in rows]),
    "texts.jsonl": lambda rows: lines(
        [{k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in rows]
    ),
}


def check(tokenizer, source, words):
    """What came of one export: "kept", "in part" or "refused"; a silent loss raises."""
    recipe = Recipe(model="demo", data=source, val_size=0)
    try:
        made = prepare_data(recipe, tokenizer)
    except LorakitError:
        return "refused"
    report = made.report
    left_out = sum(f.count for f in report.faults if f.action == "left out")
    kept = len(made.train_conversations)
    assert report.rows_read == kept + left_out == ROWS, (report.rows_read, kept, left_out)
    unused = {name for line in report.sources for name in line.get("columns_not_used", ())}
    found = " ".join(tokenizer.decode(example.input_ids) for example in made.train)
    # Rows that are reported may lack anything.
    reported = any(f.kind != "near duplicate" for f in report.faults)
    for column, cells in words.items():
        if (column.strip() or "(no name)") in unused:
            continue
        lost = [own for row in cells for own in row if own not in found]
        assert not lost or reported, (column, lost, report.sources, report.faults)
    return "in part" if left_out else "kept"


def campaign(tokenizer, folder, count):
    """`count` exports: outcomes by kind of file, tracebacks of failures, seconds of the slowest."""
    outcomes, failures, slowest = Counter(), [], 0.0
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        rng = random.Random(number)
        rows, words = table(rng)
        name = rng.choice(list(FILES))
        path = folder / name
        path.write_bytes(FILES[name](rows))
        began = time.process_time()
        try:
            outcomes[name, check(tokenizer, str(path), words)] += 1
        except Exception:
            outcomes[name, "failed"] += 1
            failures.append(
                f"{number}: {path.read_text(errors='replace')[:600]}\n" + traceback.format_exc()
            )
        slowest = max(slowest, time.process_time() - began)
    return outcomes, failures, slowest


def test_nothing_in_a_mutated_export_is_lost_in_silence(smollm, tmp_path):
    outcomes, failures, _ = campaign(smollm, tmp_path, 150)
    assert not failures, failures[0]
    ends = Counter(end for _, end in outcomes.elements())
    assert ends["kept"] > 50
    assert ends["refused"] > 30
