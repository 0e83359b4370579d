"""Secrets go, whatever shape they have; what only looks alike stays."""

import pytest

from lorakit.errors import LorakitError
from lorakit.redact import has_login, redacted
from lorakit.storage.run_dir import write_json

TOKEN = "hf_" + "CANARY" * 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"--set hub_token={TOKEN}: unknown", "--set hub_token=***: unknown"),
        ("https://user:secret@host.org/a.jsonl", "https://***@host.org/a.jsonl"),
        ("https:/user:secret@host.org/a.yaml", "https:/***@host.org/a.yaml"),
        ("s3://AK:SK@bucket/a and x", "s3://***@bucket/a and x"),
        ("https://h/a?x=1&token=abc&y=2", "https://h/a?x=1&token=***&y=2"),
        ("https://h/a?X-Amz-Signature=0af&z=1", "https://h/a?X-Amz-Signature=***&z=1"),
        ("https://h/a?sv=2024&sig=a%2Fb", "https://h/a?sv=***&sig=***"),
        ("Authorization: Bearer abcdefgh.ij", "Authorization: ***"),
        ("ghp_" + "a1" * 15, "***"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
    ],
)
def test_secrets_are_taken_out(text, expected):
    assert redacted(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub", "hf auth login", "https://a.org/@user/x?page=2", "mail a@b.org", "risk-averse",
        "key: value", "max_tokens=5", "task-specific-adaptation-of-models", "lr=1e-4&x",
    ],
)  # fmt: skip
def test_what_only_looks_alike_stays(text):
    assert redacted(text) == text


def test_values_of_the_environment_are_known_as_secrets(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    monkeypatch.setenv("TOKEN_PATH", "/home/me/token")
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", __file__)
    assert redacted(f"postgres in {__file__}") == f"postgres in {__file__}"
    assert redacted("it said: correct horse battery!") == "it said: ***!"
    assert redacted("true /home/me/token") == "true /home/me/token"


def test_errors_and_files_of_a_run_hold_none(tmp_path):
    error = LorakitError(f"no {TOKEN}", hint="ask https://a:b@c.org/x")
    assert str(error) == "no ***\nhint: ask https://***@c.org/x"
    assert TOKEN not in repr(error)
    write_json(tmp_path / "a.json", {"source": "https://a:b@c.org/x", TOKEN: 1})
    assert (
        tmp_path / "a.json"
    ).read_text() == '{\n  "source": "https://***@c.org/x",\n  "***": 1\n}\n'


def test_a_login_in_an_address_is_seen():
    assert has_login("https://user@host/x")
    assert not has_login("https://host/@user/x")
