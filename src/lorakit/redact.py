"""Text enters that may hold a token, a password or a signed address; the same without them leaves.

The one place that knows what a secret looks like. Everything lorakit writes into a run directory
and everything its command line prints passes here, tracebacks too.
"""

from __future__ import annotations

import os
import re

HIDDEN = "***"
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9_]{16,}|\bapi_org_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|\b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bglpat-[\w-]{16,}|\bxox[abprs]-[\w-]{10,}"
    r"|\bAIza[\w-]{30,}|\bnpm_[A-Za-z0-9]{30,}|\bBearer\s+[\w.~+/=-]{8,}"
)
_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.-]{0,20}:/{1,2})[^\s/@'\"<>]{1,500}@", re.IGNORECASE)
_SIGNED = re.compile(
    r"([?&;](?:[\w.-]{0,40}(?:token|secret|signature|password|passwd|credential|api[_-]?key|"
    r"access[_-]?key|auth)[\w.-]{0,20}|sig|key|pwd|se|sp|sv)=)[^&;#\s'\"<>]{1,2000}",
    re.IGNORECASE,
)
# All but tab and line end.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE)
_NO_SECRET = re.compile(r"(PATH|FILE|DIR|URL|URI|HOST|PORT|NAME)$", re.IGNORECASE)
SHORTEST = 8


def redacted(text: str) -> str:
    """`text` with *** for what opens a door: tokens, logins and signatures in addresses."""
    for secret in _of_environment():
        text = text.replace(secret, HIDDEN)
    text = _SHAPES.sub(HIDDEN, text)
    if ":/" in text:
        text = _LOGIN.sub(rf"\1{HIDDEN}@", text)
    return _SIGNED.sub(rf"\1{HIDDEN}", text) if "=" in text else text


def visible(text: str) -> str:
    """Control characters by their codes: data must not steer a terminal or hide in a page."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def has_login(address: str) -> bool:
    """True where an address holds a user's name or password."""
    return bool(_LOGIN.match(address))


def _of_environment() -> list[str]:
    found = {
        value
        for name, value in os.environ.items()
        if _NAME.search(name) and not _NO_SECRET.search(name) and len(value) >= SHORTEST
    }
    # A path is none, and a password that is one word would take that word out of every file.
    kept = [v for v in found if not v.isalpha() and not os.path.exists(v)]
    return sorted(kept, key=len, reverse=True)
