"""Tokenization with loss masks: spans of the answers, truncation, documents, checks."""
