"""The `gguf` and `gguf-adapter` formats: files for llama.cpp, run before they are kept."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.data.tokenize.encode import prompt_ids
from lorakit.errors import DependencyError, ModelError, RecipeError, WorkError
from lorakit.export import finite, llama_cpp
from lorakit.export.adapter import fold_adapter, why_not_portable
from lorakit.export.divergence import summed
from lorakit.export.gguf_convert import TYPES, Conversion, convert_all
from lorakit.export.gguf_quantize import FILE_TYPES, INSTALL, quantize_gguf
from lorakit.export.hf_files import set_thinking, write_config, write_tokenizer
from lorakit.export.merge_weights import check_space
from lorakit.export.merged import fill_merged, memory_missing
from lorakit.export.tuned_run import Job, TunedRun, checked_prompts, float32_model
from lorakit.export.verify_outputs import (
    ANSWER_TOKENS,
    PROMPTS,
    Agreement,
    Reference,
    make_reference,
    same_prompt,
)
from lorakit.model.safetensors_io import stored_tensors
from lorakit.recipe.loader import suggest
from lorakit.storage.atomic_dir import atomic_directory
from lorakit.types import Message

QUANTIZATIONS = (*TYPES, *FILE_TYPES)
# Next-token KL in nats of a right export on SmolLM2, with room; a lost template or a wrong
# permutation gives 1 and more.
LARGEST_KL = {"F32": 1e-3, "F16": 1e-2, "BF16": 2e-2, "Q8_0": 5e-2, "Q6_K": 0.1}
LARGEST_KL_OTHERS = 0.5
# Bytes a parameter of a file; K-quants pass through a 16-bit file.
FILE_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 1.1}
ADAPTER_FILE = "adapter.gguf"


def export_gguf(job: Job) -> dict[str, Any]:
    """One GGUF file of the merged model in `job.quantization`.

    Raises:
        RecipeError: unknown quantization.
        DependencyError: K-quants without xllamacpp, or no converter.
        ModelError: llama.cpp does not know the architecture or the tokenizer.
        WorkError: no space, or llama.cpp runs the file and says something else than the adapter.
    """
    facts = write_gguf(job)
    line = llama_server(job.source, job.target / facts["file"])
    job.next_steps.append(f"serve it with: {shlex.join(line)}")
    return facts


def write_gguf(job: Job) -> dict[str, Any]:
    """As `export_gguf`, for a caller that says itself what to do with the file."""
    kind = quantization(job.quantization)
    check_space(job.source, job.target, merged_type(job, kind), FILE_BYTES.get(kind, 3.0))
    with atomic_directory(job.target) as folder:
        return fill_gguf(job, folder, kind)


def llama_server(source: TunedRun, file: Path, *more: str) -> list[str]:
    """The line that serves a GGUF file."""
    return ["llama-server", "-m", str(file), *more, "--jinja", "-c", str(source.context)]


def merged_type(job: Job, kind: str) -> str:
    """The type of the merged model that a file of `kind` is made of.

    A base's bfloat16 values keep their bits in float16 (from 2^-14 on), whose steps are an eighth:
    after 12 steps of QLoRA SmolLM2 was 7e-2 nats off in bfloat16. A BF16 file gains nothing.
    """
    own = job.source.device.dtype
    return job.dtype or ("float16" if own == "bfloat16" and kind != "BF16" else own)


def quantization(asked: str | None) -> str:
    """The quantization in llama.cpp's spelling.

    Raises:
        RecipeError: there is none of that name; lists them.
        DependencyError: it needs a package that is not there.
    """
    kind = (asked or "F16").upper().replace("-", "_")
    kind = {"FP16": "F16", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}.get(kind, kind)
    if kind not in QUANTIZATIONS:
        raise RecipeError(
            f"--quant {asked}: unknown quantization{suggest(kind, QUANTIZATIONS)}",
            hint=f"quantizations: {', '.join(QUANTIZATIONS)}",
        )
    if kind in FILE_TYPES and not llama_cpp.installed():
        raise DependencyError(
            f"--quant {kind} needs llama.cpp as packaged in xllamacpp, which is not installed",
            hint=f"{INSTALL}, or take one of {', '.join(TYPES)}",
        )
    return kind


def fill_gguf(job: Job, folder: Path, kind: str) -> dict[str, Any]:
    """Write `<run>-<kind>.gguf` into `folder` by way of the merged model, and run it."""
    source = job.source
    path = folder / f"{source.name}-{kind}.gguf"
    with tempfile.TemporaryDirectory(dir=folder, prefix="merged-") as work:
        merged = Path(work) / "model"
        merged.mkdir()
        facts, reference = fill_merged(job, merged, merged_type(job, kind), wider(kind))
        set_thinking(source, merged)
        window = limit_context(source, merged)
        if window:
            job.console.print(
                f"note: llama.cpp attends past this model's window of {window} tokens: the file's "
                "context ends there"
            )
        first = kind
        if kind in FILE_TYPES:
            first = "BF16" if facts["dtype"] == "bfloat16" else "F16"
        if first == "F16":
            check_half(merged, wider(kind))
        written = path if first == kind else Path(work) / "first.gguf"
        job.console.print(f"writing GGUF {kind}")
        order = Conversion(
            merged, written, first, f"{source.base_name.split('/')[-1]}-{source.name}"
        )
        convert_all([order], job.console.print, source.recipe.offline)
        if first != kind:
            fallbacks = quantize_gguf(written, path, kind)
            facts["rows_not_of_256"] = fallbacks
            if fallbacks:
                job.console.print(
                    f"{fallbacks} matrices have rows of no multiple of 256: they take more bits"
                )
    path.chmod(0o644)
    facts = {"merged": facts, "quantization": kind, "file": path.name, "bytes": path.stat().st_size}
    return {**facts, **run_gguf(job, reference, path, None, kind)}


def wider(kind: str) -> str:
    """What to do where float16 does not hold the model's values."""
    if kind == "F16":
        return "export with --quant BF16 (as small)"
    return f"add --dtype {'float32' if kind == 'F32' else 'bfloat16'}"


def check_half(folder: Path, hint: str) -> None:
    """Refuse matrices that llama.cpp's converter would turn into infinity as F16.

    Raises:
        WorkError: names the first.
    """
    import torch

    for name, stored in stored_tensors(folder).items():
        if stored.dtype in ("F32", "BF16") and len(stored.shape) > 1:  # vectors stay float32
            finite.cast(name, stored.read(), torch.float16, hint)


def limit_context(source: TunedRun, folder: Path) -> int | None:
    """Bound the context by the window where llama.cpp knows none; that window.

    A Mistral becomes a Llama in GGUF: past the window KL was 7e-2 nats, 1e-7 before it.
    """
    config = source.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if config.model_type not in ("mistral", "ministral") or not window:
        return None
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["max_position_embeddings"] = min(window, config.max_position_embeddings)
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return int(window)


def run_gguf(
    job: Job, reference: Reference | None, model: Path, adapter: Path | None, kind: str
) -> dict[str, Any]:
    """Load the file in llama.cpp and compare its answers with the adapter's.

    Raises:
        WorkError: it cannot be loaded, reads chats otherwise, or predicts something else.
    """
    if not llama_cpp.installed():
        job.console.print(f"not run in llama.cpp: xllamacpp is not installed ({INSTALL})")
        return {"skipped": "xllamacpp is not installed"}
    chats = tuple(
        [{"role": m.role, "content": m.content} for m in c.messages[:-1]]
        for c in checked_prompts(job.source, PROMPTS)
        if not c.tools and all(not m.extra for m in c.messages)
    )
    prompts, answers = (reference.prompts, reference.answers) if reference else ([], [])
    longest = max([len(p) for p in prompts], default=0)
    task = llama_cpp.Task(
        str(model),
        prompts,
        answers,
        end_of_turn(job.source),
        str(adapter) if adapter else None,
        chats,
        context=longest * 2 + 2 * ANSWER_TOKENS + 512,
    )
    job.console.print(f"running {model.name} in llama.cpp")
    (heard,) = llama_cpp.ask_all([task])
    if reference is None:
        _same_chats(job.source, heard.chat_ids, chats)
        words = "llama.cpp runs it and reads chats as training did; predictions are not compared"
        job.console.print(words)
        return {"skipped": words}
    found = compare_heard(job.source, reference, heard, chats)
    _check_distance(job, found.kl_per_token, reference.base_kl, kind, adapter or model)
    return found.as_dict()


def _check_distance(job: Job, kl: float, base_kl: float, kind: str, file: Path) -> None:
    """Refuse a file that is not the tuned model; warn where `kind` costs more than tuning changed.

    Raises:
        WorkError: it predicts something else, or an adapter in it has no effect.
    """
    largest = LARGEST_KL.get(kind, LARGEST_KL_OTHERS)
    if not kl <= largest:
        raise WorkError(
            f"{file.name}: llama.cpp predicts something else than the adapter (KL {kl:.3g} nats "
            f"per token, at most {largest:g}); it was not kept",
            hint="with --dtype bfloat16 it may be the cast: take float16; else please report this "
            "model family",
        )
    if kl < base_kl:
        return
    far = f"(KL {kl:.2g} nats per token; the untuned base: {base_kl:.2g})"
    if file.name == ADAPTER_FILE:
        raise WorkError(
            f"{file.name}: with it llama.cpp is no nearer to the tuned model than its base {far}; "
            "it was not kept",
            hint="export the merged model: lorakit export RUN --to gguf",
        )
    job.next_steps.append(
        f"hint: {kind} costs more than the tuning changed {far}: take a larger --quant"
    )


def end_of_turn(source: TunedRun) -> int:
    """The id of the token that ends an answer."""
    return int(source.tokenizer.convert_tokens_to_ids(source.end_of_turn()))


def compare_heard(
    source: TunedRun,
    reference: Reference,
    heard: llama_cpp.Heard,
    chats: tuple[list[dict[str, Any]], ...] = (),
) -> Agreement:
    """llama.cpp's predictions along the adapter's answers, and its reading of the chats.

    Raises:
        WorkError: its template or tokenizer makes other prompts than training saw, it does not
            stop at the end of turn, or it predicts NaN.
    """
    _same_chats(source, heard.chat_ids, chats)
    if not heard.stops:
        raise WorkError(
            f"llama.cpp does not stop at {source.end_of_turn()!r}, which ends an answer; "
            "nothing was kept",
            hint="please report this model's tokenizer",
        )
    pairs = zip(reference.predictions, heard.places, strict=True)
    scored = [llama_cpp.scored(rows, places) for rows, places in pairs]
    kl, same, equal, positions = summed(scored, "the file in llama.cpp")
    count = len(heard.places)
    notes = {"engine": "llama.cpp (xllamacpp)", "stops_at": source.end_of_turn()}
    return Agreement(kl, same, equal, positions, count, notes)


def _same_chats(
    source: TunedRun, heard: Sequence[list[int]], chats: Sequence[list[dict[str, Any]]]
) -> None:
    """Raises:
    WorkError: a chat is other tokens than in training.
    """
    for number, (ids, turns) in enumerate(zip(heard, chats, strict=True), 1):
        wanted = prompt_ids(source.tokenizer, [Message(t["role"], t["content"]) for t in turns])
        message = f"llama.cpp reads held-out chat {number} otherwise than in training"
        same_prompt(source.tokenizer, ids, wanted, message)


def export_gguf_adapter(job: Job) -> dict[str, Any]:
    """The adapter as one GGUF file, its scale folded in, for `llama-server --lora`.

    Raises:
        ModelError: something in it that a GGUF adapter cannot carry; said before writing.
        WorkError: llama.cpp with base and adapter says something else than the adapter.
    """
    refuse_unportable(job.source)
    with atomic_directory(job.target) as folder:
        facts = fill_gguf_adapter(job, folder)
    more = ("--lora", str(job.target / ADAPTER_FILE))
    line = llama_server(job.source, Path("BASE.gguf"), *more)
    job.next_steps.append(f"serve it with: {shlex.join(line)}")
    base = f"lorakit export {shlex.quote(str(job.source.run.path))} --to ollama --adapter"
    job.next_steps.append(f"BASE.gguf, its base, is written by: {base}")
    return facts


def refuse_unportable(source: TunedRun) -> None:
    """Say what an adapter in GGUF cannot carry.

    Raises:
        ModelError: it holds that.
    """
    reason = why_not_portable(source)
    if reason:
        raise ModelError(
            f"this adapter cannot be a GGUF adapter: {reason}",
            hint="export the merged model: lorakit export RUN --to gguf",
        )


def fill_gguf_adapter(job: Job, folder: Path, keep_base: str | None = None) -> dict[str, Any]:
    """Write adapter.gguf (and `keep_base`, the base as GGUF) into `folder`, and run them."""
    source = job.source
    with tempfile.TemporaryDirectory(dir=folder, prefix="folded-") as work:
        folded, base = Path(work) / "adapter", Path(work) / "base"
        folded.mkdir()
        base.mkdir()
        fold_adapter(source, folded)
        write_config(source, base, source.device.dtype, tied=source.tied)
        write_tokenizer(source, base)
        set_thinking(source, base)
        path = folder / ADAPTER_FILE
        jobs = [Conversion(folded, path, "F32", source.name, base)]
        run = llama_cpp.installed() or keep_base is not None
        base_file = folder / keep_base if keep_base else Path(work) / "base.gguf"
        if run and source.folder is not None:
            link_weights(source.folder, base)
            check_half(base, "export the merged model: --to gguf --quant BF16")
            jobs.append(Conversion(base, base_file, "F16", source.base_name.split("/")[-1]))
        convert_all(jobs, job.console.print, source.recipe.offline)
        path.chmod(0o644)
        _check_no_path(path, source)
        facts: dict[str, Any] = {"file": path.name, "bytes": path.stat().st_size}
        short = memory_missing(source)
        if not (job.verify and run) or short:
            return {**facts, "skipped": short or "not run in llama.cpp"}
        # The base runs as F16: for a QLoRA run that is not the base it was trained on.
        merge_base = "original" if source.recipe.method == "qlora" else "quantized"
        if merge_base == "original":
            job.console.print(
                "note: compared on the original base, which is what llama.cpp puts it on; this run "
                "was trained on 4-bit values of it: --to gguf holds those"
            )
        reference = make_reference(source, float32_model(source, merge_base))
        return {
            **facts,
            "merge_base": merge_base,
            **run_gguf(job, reference, base_file, path, "F16"),
        }


def link_weights(folder: Path, target: Path) -> None:
    """Make the weight files of `folder` those of `target` too."""
    for path in folder.glob("*.safetensors*"):
        (target / path.name).symlink_to(path.resolve())


def _check_no_path(path: Path, source: TunedRun) -> None:
    """The converter writes names of folders into the file's metadata."""
    from gguf import GGUFReader

    for field in GGUFReader(path).fields.values():
        text = json.dumps(field.contents(), default=str) if field.types else ""
        if str(source.location) in text or str(path.parent) in text:
            raise WorkError(f"{path.name}: {field.name} holds a path of this machine; not kept")
