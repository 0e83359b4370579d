"""Facts are read at the border: a real nvidia-smi script, a real folder that cannot be written."""

import os
import sys
from pathlib import Path

import pytest

from lorakit.doctor import system_info
from lorakit.doctor.system_info import (
    Driver,
    ask_hub,
    cache_folder,
    cached_models,
    installed_versions,
    read_driver,
    writable,
)

SMI = """#!/bin/sh
case "$1" in
  --query*) echo "580.65.06, NVIDIA H100 80GB HBM3, 81559, 12000"
            echo "580.65.06, NVIDIA H100 80GB HBM3, 81559, [N/A]" ;;
  *) echo "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0     |" ;;
esac
"""


@pytest.fixture
def smi(tmp_path, monkeypatch):
    def write(text):
        program = tmp_path / "nvidia-smi"
        program.write_text(text)
        program.chmod(0o755)

    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return write


def test_the_driver_is_read_from_nvidia_smi(smi, monkeypatch):
    smi(SMI)
    found = read_driver()
    cards = (("NVIDIA H100 80GB HBM3", 81559, 12000), ("NVIDIA H100 80GB HBM3", 81559, 0))
    assert found == Driver("580.65.06", "13.0", cards)
    smi("#!/bin/sh\necho NVIDIA-SMI has failed because it could not reach the driver.\nexit 9\n")
    assert "has failed" in read_driver().error
    smi("#!/bin/sh\nexit 0\n")
    assert read_driver().error == "it lists no GPU"
    monkeypatch.setenv("PATH", "")
    assert read_driver() is None


def test_the_cache_is_where_the_hubs_client_keeps_it(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x"


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    assert writable(tmp_path / "not" / "made" / "yet")
    assert not writable(Path("/proc"))
    if os.geteuid():
        tmp_path.chmod(0o555)
        assert not writable(tmp_path)


def test_the_hub_is_asked_only_when_it_may_be(tmp_path, monkeypatch):
    assert ask_hub(str(tmp_path), offline=False) == "local"
    assert ask_hub("someone/model", offline=True) == "offline"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ask_hub("someone/model", offline=False) == "offline"


def test_an_unreachable_hub_is_an_answer(monkeypatch):
    import huggingface_hub

    def refuse(model):
        raise ConnectionError("no route to the hub")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "auth_check", refuse)
    assert ask_hub("someone/model", offline=False) == "ConnectionError: no route to the hub"


def test_gated_models_tell_login_from_access(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def gate(kind):
        def check(model):
            raise kind.__new__(kind, "no")  # its own constructor wants a response

        monkeypatch.setattr(huggingface_hub, "auth_check", check)

    gate(GatedRepoError)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert ask_hub("a/b", offline=False) == "no token"
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    assert ask_hub("a/b", offline=False) == "gated"
    gate(RepositoryNotFoundError)
    assert ask_hub("a/b", offline=False) == "missing"


def test_everything_is_gathered(monkeypatch):
    told = {name: {"version": "1"} for name in ("torch", "bitsandbytes", "triton")}
    monkeypatch.setattr(system_info, "run_import_probe", lambda: told)
    found = system_info.collect_system_info()
    assert found.python == sys.version_info[:3]
    assert found.torch == {"version": "1"}
    assert 0 < found.free_ram_bytes <= found.ram_bytes
    assert found.free_disk["here"] > 0
    assert installed_versions()["torch"] == found.packages["torch"]
    assert found.hub == "not asked"


def test_models_of_the_cache_have_their_names_and_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert cached_models() == []
    for name in ("models--owner--some-model", "datasets--a--b"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "x").write_bytes(b"0" * 9)
    assert cached_models() == [("owner/some-model", 9)]
