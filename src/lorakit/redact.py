"""Remove tokens, passwords and signed addresses from text.

All text that lorakit writes to a run directory or prints on the command line is filtered here,
including tracebacks. Only this module defines the shapes of secrets.
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
# All control characters except tab and line feed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_NAME = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_KEY|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE)
_NO_SECRET = re.compile(r"(PATH|FILE|DIR|URL|URI|HOST|PORT|NAME)$", re.IGNORECASE)
SHORTEST = 8


def redacted(text: str) -> str:
    """Replace tokens, and logins and signatures in addresses, by ***."""
    for secret in _of_environment():
        text = text.replace(secret, HIDDEN)
    text = _SHAPES.sub(HIDDEN, text)
    if ":/" in text:
        text = _LOGIN.sub(rf"\1{HIDDEN}@", text)
    return _SIGNED.sub(rf"\1{HIDDEN}", text) if "=" in text else text


def visible(text: str) -> str:
    """Escape control characters, so that data cannot control a terminal or hide text in a page."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match.group()):02x}", text)


def has_login(address: str) -> bool:
    """Return True if an address contains a user name or password."""
    return bool(_LOGIN.match(address))


def _of_environment() -> list[str]:
    values = {
        value
        for name, value in os.environ.items()
        if _NAME.search(name) and not _NO_SECRET.search(name) and len(value) >= SHORTEST
    }
    # Paths are not secrets, and a password that is a plain word would remove it from every file.
    secrets = [v for v in values if not v.isalpha() and not os.path.exists(v)]
    return sorted(secrets, key=len, reverse=True)
