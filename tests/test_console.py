"""Silence for the length of a call, and everything as it was afterwards."""

import logging
import warnings

import huggingface_hub
import pytest
from transformers.utils import logging as transformers_logging

from lorakit.console import silence_libraries


def test_nothing_is_said_inside_and_all_is_as_before_outside(request):
    logger = logging.getLogger("peft")
    request.addfinalizer(lambda level=logger.level: logger.setLevel(level))
    logger.setLevel(logging.INFO)
    before = transformers_logging.get_verbosity()
    transformers_logging.enable_progress_bar()
    with silence_libraries():
        assert not logger.isEnabledFor(logging.WARNING)
        assert not transformers_logging.is_progress_bar_enabled()
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn("noise", FutureWarning, stacklevel=1)
        assert not caught
    assert logger.level == logging.INFO
    assert transformers_logging.get_verbosity() == before
    assert transformers_logging.is_progress_bar_enabled()
    with pytest.warns(FutureWarning):
        warnings.warn("heard again", FutureWarning, stacklevel=1)


def test_offline_lasts_as_long_as_the_call(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ZeroDivisionError), silence_libraries(offline=True):
        assert huggingface_hub.is_offline_mode()
        raise ZeroDivisionError
    assert not huggingface_hub.is_offline_mode()
