"""Masks on real vocabularies: the ids that transformers makes, and exactly the answers trained.

Families out of reach are skipped by name, and big ones unless LORAKIT_BIG_TOKENIZERS=1 is set.
"""

from importlib.resources import files

import pytest
from transformers import AddedToken

from lorakit.data.chat_template.select import resolve_template
from lorakit.data.issues import IssueLog
from lorakit.data.tokenize.encode import encode, prompt_ids
from lorakit.types import Conversation, Message, Origin

AT = Origin("rows.jsonl", 1)
FIRST, SECOND = "零 🦙 é\n\n- a", "  if a:\n    return 1"
CHAT = (
    Message("system", "Be brief."),
    Message("user", "größe 日本?"),
    Message("assistant", FIRST),
    Message("user", "مرحبا  x"),
    Message("assistant", SECOND),
)
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "get", "arguments": {"q": "x"}}}
QUERY = {"type": "object", "properties": {"q": {"type": "string", "description": "words"}}}
TOOL = {"type": "function", "function": {"name": "get", "description": "d", "parameters": QUERY}}
CALLS = (
    Message("user", "q"),
    Message("assistant", "", {"tool_calls": [CALL]}),
    Message("tool", "r", {"tool_call_id": "abcdefghi", "name": "get"}),
    Message("assistant", "A."),
)
PHI3 = ("assistant", "system", "end", "user")
HERMES = '<tool_call>\n{"name": "get", "arguments": {"q": "x"}}\n</tool_call><|im_end|>'
XML = (
    "<tool_call>\n<function=get>\n<parameter=q>\nx\n</parameter>\n</function>\n</tool_call>"
    "<|im_end|>"
)
LLAMA = '{"name": "get", "parameters": {"q": "x"}}<|eot_id|>'
HARMONY = (
    ' to=functions.get<|channel|>commentary json<|message|>{"q": "x"}<|call|>',
    "<|channel|>final<|message|>A.<|return|>",
)
FINAL = "<|channel|>final<|message|>"
# (vocabulary, one of TRL's templates or its own): end of turn, what precedes an answer, whether
# answers are trimmed, runs of a call
FAMILIES = {
    ("qwen3", ""): ("<|im_end|>", "", False, (HERMES, "A.<|im_end|>")),
    ("qwen3", "qwen3_instruct_2507"): ("<|im_end|>", "", False, (HERMES, "A.<|im_end|>")),
    ("qwen3", "qwen3_5_think"): ("<|im_end|>", "", True, (XML, "A.<|im_end|>")),
    ("llama3", "llama3_2"): ("<|eot_id|>", "", True, (LLAMA, "A.<|eot_id|>")),
    ("llama3_1", "llama3_1"): ("<|eot_id|>", "", True, (LLAMA, "A.<|eot_id|>")),
    ("llama2", "phi3"): ("<|end|>", "", True, ()),
    ("deepseek_v3", ""): ("<｜end▁of▁sentence｜>", "", False, ()),
    ("gemma3", ""): ("<end_of_turn>", "", True, ()),
    ("gptoss", "gptoss"): ("<|return|>", FINAL, False, HARMONY),
}


@pytest.fixture(scope="module")
def loaded():
    """The last vocabulary that was loaded: those of several families do not fit a small machine."""
    return {}


@pytest.fixture(params=FAMILIES, ids=lambda key: " ".join(key).strip())
def real(request, loaded, fetch_tokenizer):
    """(tokenizer with its resolved template, what is expected of it)."""
    from transformers import AutoTokenizer

    name, template = request.param
    if name not in loaded:
        folder = fetch_tokenizer(name, big=name not in ("qwen3", "llama3", "llama2"))
        loaded.clear()
        loaded[name] = AutoTokenizer.from_pretrained(folder)
        loaded["own"] = loaded[name].chat_template
    tokenizer = loaded[name]
    if (
        template == "phi3"
    ):  # Llama 2's vocabulary, with marks that remove the white space after them
        marks = [AddedToken(f"<|{mark}|>", rstrip=True, normalized=False) for mark in PHI3]
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = loaded["own"]
    if template:
        path = files("trl") / "chat_templates" / f"{template}.jinja"
        tokenizer.chat_template = path.read_text("utf-8")
    resolve_template(tokenizer, f"some/{name}", False)
    return tokenizer, FAMILIES[request.param]


def test_the_ids_are_those_of_transformers_and_only_answers_are_trained(real, trained_runs):
    tokenizer, (stop, begin, trims, calls) = real
    cases = [(CHAT, (), [begin + FIRST, begin + (SECOND.lstrip() if trims else SECOND)])]
    if calls:
        cases.append((CALLS, (TOOL,), [run.removesuffix(stop) for run in calls]))
    for messages, tools, answers in cases:
        log = IssueLog()
        examples = encode(tokenizer, Conversation(messages, AT, tools), log=log)
        trimmed = [f for f in log.faults() if f.kind == "spaces at the start of an answer"]
        assert bool(trimmed) == (trims and messages is CHAT)
        runs = trained_runs(tokenizer, examples)
        assert [run.removesuffix(stop) for run in runs] == answers
        assert all(run.endswith((stop, "<|call|>")) for run in runs)
        ids = tokenizer.apply_chat_template(
            [m.as_dict() for m in messages], tools=list(tools) or None, return_dict=False
        )
        last = examples[-1].input_ids
        assert ids[: len(last)] == last
        # Qwen's templates write a line end after the end of turn, Phi-3's the end of the text.
        assert tokenizer.decode(ids[len(last) :]).strip() in ("", tokenizer.eos_token)
        asked = prompt_ids(tokenizer, messages[:-1], tools)
        assert last[: len(asked)] == asked
