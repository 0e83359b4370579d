"""Tokenizers and conversations, as the tests of data have them."""

from tests.data.conftest import chat, family, load_family, smollm

__all__ = ["chat", "family", "load_family", "smollm"]
