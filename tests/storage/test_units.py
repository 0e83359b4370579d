"""Sizes in bytes."""

import pytest

from lorakit.storage.units import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        (" 512MiB ", 512 * 2**20),
        ("500 MB", 5 * 10**8),
    ],
)
def test_sizes_are_bytes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "12", "GB", "-1GB", "12 TB", "12gb", "0GB", "1e3GB", "12GB x"]
)
def test_other_texts_are_no_size(text):
    assert parse_size(text) is None
