"""Bad input of every kind: rows or one clear error, and rows in are rows kept and rows reported.

`benchmarks/fuzz.py data` runs the same campaign with 10,000 inputs.
"""

import functools
import gzip
import json
import shutil
import time
import traceback
import zipfile
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.data.prepare import prepare_data
from lorakit.errors import LorakitError
from lorakit.recipe.schema import Recipe

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet", ".jsonl.gz", ".csv.gz")
TEXT = st.text(max_size=20) | st.sampled_from(
    ["", " ", "<|im_end|>", "\ud800", "\x00", "\u2028", "e\u0301", "NA", "</think>", "word " * 300]
)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ROLE = st.sampled_from(["user", "assistant", "system", "gpt", "human", "tool", "", None, 3])
CALLS = st.sampled_from([None, [], [{"function": {"name": "f", "arguments": "{"}}], [3], "x", {}])
TURN = st.one_of(
    SCALAR,
    st.fixed_dictionaries(
        {},
        optional={
            "role": ROLE, "from": ROLE, "content": SCALAR | st.lists(SCALAR, max_size=2),
            "value": SCALAR, "tool_calls": CALLS, "train": SCALAR, "weight": SCALAR,
        },
    ),
)  # fmt: skip
GOOD_TURNS = st.lists(TEXT, min_size=2, max_size=6).map(
    lambda texts: [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
)
CELL = SCALAR | st.lists(TURN, max_size=4) | GOOD_TURNS
COLUMNS = [
    "question", "answer", "instruction", "input", "output", "response", "messages",
    "conversations", "text", "system", "history", "tools", "prompt", "completion", "chosen",
    "rejected",
]  # fmt: skip
ROW = st.one_of(
    st.fixed_dictionaries({"question": TEXT, "answer": TEXT}),
    st.fixed_dictionaries({"messages": GOOD_TURNS | st.lists(TURN, max_size=4)}),
    st.fixed_dictionaries({"conversations": st.lists(TURN, max_size=4), "tools": CELL}),
    st.dictionaries(st.sampled_from(COLUMNS) | st.text(max_size=3), CELL, max_size=4),
)
WORDS = st.sampled_from(["one", "two three", "four\n\nfive. Six!", "`code`", "naïve", "日本語"])
GOOD = st.sampled_from(
    [
        lambda i, w: {"question": f"{w} {i}?", "answer": w},
        lambda i, w: {"instruction": w, "input": str(i), "output": w},
        lambda i, w: {"messages": [{"role": "user", "content": f"{w} {i}"},
                                   {"role": "assistant", "content": w}]},
        lambda i, w: {"text": f"{w} {i} {w}"},
    ]
)  # fmt: skip


@st.composite
def mixed_rows(draw):
    """Rows of one good format, with a few of any kind among them."""
    make = draw(GOOD)
    rows = [make(i, draw(WORDS)) for i in range(draw(st.integers(0, 6)))]
    return draw(st.permutations(rows + draw(st.lists(ROW, min_size=not rows, max_size=3))))


ROWS = mixed_rows()
PIECES = st.sampled_from(
    ['{"question": ', '"x"', "}", "[", "]", ",", "\n", '"', "é", "\r", "NA", "q,a", ";", "\t", "{"]
)
RAISES = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}"


@functools.cache
def bomb():
    return gzip.compress(b"a" * (70 * 2**20))


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


DATA = st.one_of(
    st.tuples(st.just("rows"), ROWS.map(jsonl)),
    st.tuples(st.just("json array"), ROWS.map(lambda rows: json.dumps(rows, indent=1).encode())),
    st.tuples(
        st.just("utf-16"),
        st.tuples(ROWS.map(jsonl), st.sampled_from(["utf-16", "utf-16", "utf-32"])).map(
            lambda t: t[0].decode().encode(t[1])
        ),
    ),
    st.tuples(st.just("wrapped"), ROWS.map(lambda rows: json.dumps({"data": rows}).encode())),
    st.tuples(st.just("packed"), ROWS.map(jsonl).map(gzip.compress)),
    st.tuples(st.just("bytes"), st.binary(max_size=200)),
    st.tuples(st.just("pieces"), st.lists(PIECES, max_size=30).map(lambda p: "".join(p).encode())),
    st.tuples(
        st.just("csv"),
        st.lists(st.text('ab,"\n;x\t', max_size=12), max_size=6).map(
            lambda lines: ("question,answer\n" + "\n".join(lines)).encode()
        ),
    ),
    st.tuples(
        st.just("cut"),
        st.tuples(
            ROWS.map(jsonl) | ROWS.map(lambda rows: json.dumps(rows).encode())
            | ROWS.map(lambda rows: jsonl(rows).decode().encode("utf-16")),
            st.integers(0, 200),
        ).map(lambda t: t[0][: t[1]]),
    ),
    st.tuples(
        st.just("deep"),
        st.tuples(st.sampled_from([b"[", b'{"messages":', b'{"text":[']), st.integers(1, 3000)).map(
            lambda t: t[0] * t[1]
        ),
    ),
    st.tuples(
        st.just("long row"),
        st.integers(1, 200_000).map(lambda n: jsonl([{"question": "q", "answer": "ab " * n}])),
    ),
    st.tuples(
        st.just("bomb"), st.builds(bomb)
    ),
)  # fmt: skip
FOLDER = st.sampled_from(["file"] * 12 + ["folder", "folder", "loop", "escape", "dangling", "zip"])
# The natural suffix of a kind of input, or any.
SUFFIX = {"json array": ".json", "wrapped": ".json", "packed": ".jsonl.gz", "csv": ".csv"}
VALUES = st.fixed_dictionaries(
    {"val_size": st.sampled_from([0, 0, 0, 0.5, 1, 3])},
    optional={
        "cutoff_len": st.sampled_from([8, 16, 40, 60, 2048]),
        "on_overlength": st.sampled_from(["drop_oldest_turns", "split", "drop", "error"]),
        "train_on": st.sampled_from(["responses", "last", "all"]),
        "documents": st.just("instruction"),
        "strict": st.sampled_from([False, False, False, True]),
        "system": TEXT.filter(lambda t: "\ud800" not in t),
        "columns": st.sampled_from([{}, {}, {}, {"text": "question"}, {"response": "nowhere"}]),
    },
)


def build(folder, shape, suffix, data):
    """The source of one case: a file, or a folder with something odd in it."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "data").mkdir(parents=True)
    path = folder / "data" / f"rows{suffix}"
    path.write_bytes(data)
    if shape == "folder":
        (folder / "data" / "more.jsonl").write_bytes(jsonl([{"question": "q", "answer": "a"}] * 3))
        (folder / "data" / "notes.docx").write_bytes(b"PK")
    elif shape == "loop":
        (folder / "data" / "inner").symlink_to(folder / "data", target_is_directory=True)
    elif shape == "escape":
        (folder / "outside.jsonl").write_bytes(data)
        (folder / "data" / "out.jsonl").symlink_to(folder / "outside.jsonl")
    elif shape == "dangling":
        (folder / "data" / "gone.jsonl").symlink_to(folder / "nowhere")
    elif shape == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("rows.jsonl", data)
    return str(path if shape in ("file", "zip") else folder / "data")


def check(tokenizer, source, values):
    """What came of one input: "kept" or "refused"; a fault of ours raises."""
    try:
        made = prepare_data(Recipe(model="demo", data=source, **values), tokenizer)
    except LorakitError:
        return "refused"
    report = made.report
    left_out = sum(f.count for f in report.faults if f.action == "left out")
    cut = sum(f.count for f in report.faults if f.kind.endswith("tokens of a single document"))
    kept = len(made.train_conversations) + len(made.val_conversations) - cut
    assert report.rows_read == kept + left_out, (report.rows_read, kept, left_out)
    assert len(made.train) > 0
    for example in (*made.train, *made.val):
        assert len(example.input_ids) <= report.cutoff_len
        assert example.trained_tokens
    return "kept"


def campaign(tokenizer, folder, count):
    """`count` inputs: outcomes by kind of input, tracebacks of failures, seconds of the slowest."""
    outcomes, failures, slowest = Counter(), [], 0.0
    template = tokenizer.chat_template

    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(DATA, st.sampled_from([None, None, None, *SUFFIXES]), FOLDER, VALUES, st.integers(0, 4))
    def attempt(data, suffix, shape, values, raises):
        nonlocal slowest
        kind, content = data
        suffix = suffix or SUFFIX.get(kind, ".jsonl")
        source = build(folder, shape, suffix, content)
        tokenizer.chat_template = (RAISES if raises == 4 else "") + template
        began = time.process_time()
        try:
            outcomes[kind, check(tokenizer, source, values)] += 1
        except Exception:
            outcomes[kind, "failed"] += 1
            failures.append(traceback.format_exc())
        finally:
            tokenizer.chat_template = template
            slowest = max(slowest, time.process_time() - began)

    attempt()
    return outcomes, failures, slowest


def test_bad_input_of_every_kind(smollm, tmp_path):
    outcomes, failures, _ = campaign(smollm, tmp_path / "case", 200)
    assert not failures, failures[0]
    assert sum(count for (_, end), count in outcomes.items() if end == "kept") > 30


def test_ten_megabytes_in_one_row(smollm, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "word " * 2_000_000}))
    made = prepare_data(Recipe(model="demo", data=str(path), val_size=0), smollm)
    assert made.report.rows_read == len(made.train_conversations) == 1
    assert made.report.trained_tokens_train > 1_900_000
