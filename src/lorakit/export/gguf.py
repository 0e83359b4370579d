"""The `gguf` and `gguf-adapter` formats: files for llama.cpp, verified by running them."""

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
# Above the next-token KL in nats of a correct export of SmolLM2; a lost template or a wrong
# permutation gives 1 and more.
LARGEST_KL = {"F32": 1e-3, "F16": 1e-2, "BF16": 2e-2, "Q8_0": 5e-2, "Q6_K": 0.1}
LARGEST_KL_OTHERS = 0.5
# Bytes per parameter of a file; K-quants are made from a 16-bit file.
FILE_BYTES = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 1.1}
ADAPTER_FILE = "adapter.gguf"


def export_gguf(job: Job) -> dict[str, Any]:
    """Write one GGUF file of the merged model in `job.quant`.

    Raises:
        RecipeError: unknown quantization.
        DependencyError: K-quants without xllamacpp, or the converter is missing.
        ModelError: llama.cpp does not know the architecture or the tokenizer.
        WorkError: the disk is too small, or llama.cpp predicts something else than the adapter.
    """
    facts = write_gguf(job)
    line = llama_server(job.source, job.target / facts["file"])
    job.next_steps.append(f"serve it with: {shlex.join(line)}")
    return facts


def write_gguf(job: Job) -> dict[str, Any]:
    """Write the file of `export_gguf` without adding next steps."""
    kind = quantization(job.quant)
    check_space(job.source, job.target, merged_type(job, kind), FILE_BYTES.get(kind, 3.0))
    with atomic_directory(job.target) as folder:
        return fill_gguf(job, folder, kind)


def llama_server(source: TunedRun, file: Path, *more: str) -> list[str]:
    """Command that serves a GGUF file."""
    return ["llama-server", "-m", str(file), *more, "--jinja", "-c", str(source.context)]


def merged_type(job: Job, kind: str) -> str:
    """Choose the dtype of the merged model for a file of `kind`.

    A base's bfloat16 values (from 2^-14 on) are exact in float16, whose steps are an eighth as
    large: after 12 steps of QLoRA SmolLM2 was 7e-2 nats off in bfloat16. A BF16 file gains nothing.
    """
    training_dtype = job.source.device.dtype
    return job.dtype or (
        "float16" if training_dtype == "bfloat16" and kind != "BF16" else training_dtype
    )


def quantization(asked: str | None) -> str:
    """Normalize a quantization name to llama.cpp's spelling.

    Raises:
        RecipeError: unknown name; lists the known ones.
        DependencyError: it needs a package that is not installed.
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
    """Merge, write `<run>-<kind>.gguf` into `folder`, and run it."""
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
                f"note: llama.cpp ignores this model's sliding window of {window} tokens, so the "
                "file's context is limited to it"
            )
        first_type = kind
        if kind in FILE_TYPES:
            first_type = "BF16" if facts["dtype"] == "bfloat16" else "F16"
        if first_type == "F16":
            check_half(merged, wider(kind))
        written = path if first_type == kind else Path(work) / "first.gguf"
        job.console.print(f"writing GGUF {kind}")
        conversion = Conversion(
            merged, written, first_type, f"{source.base_name.split('/')[-1]}-{source.name}"
        )
        convert_all([conversion], job.console.print, source.recipe.offline)
        if first_type != kind:
            fallbacks = quantize_gguf(written, path, kind)
            facts["rows_not_of_256"] = fallbacks
            if fallbacks:
                job.console.print(
                    f"{fallbacks} matrices take more bits: row length not a multiple of 256"
                )
    path.chmod(0o644)
    facts = {"merged": facts, "quantization": kind, "file": path.name, "bytes": path.stat().st_size}
    return {**facts, **run_gguf(job, reference, path, None, kind)}


def wider(kind: str) -> str:
    """Hint for models with values beyond float16."""
    if kind == "F16":
        return "export with --quant BF16 (as small)"
    return f"add --dtype {'float32' if kind == 'F32' else 'bfloat16'}"


def check_half(folder: Path, hint: str) -> None:
    """Refuse matrices with values that become infinity as F16 in llama.cpp's converter.

    Raises:
        WorkError: names the first such matrix.
    """
    import torch

    for name, stored in stored_tensors(folder).items():
        if stored.dtype in ("F32", "BF16") and len(stored.shape) > 1:  # vectors stay float32
            finite.cast(name, stored.read(), torch.float16, hint)


def limit_context(source: TunedRun, folder: Path) -> int | None:
    """Limit the context to a sliding window that llama.cpp ignores; return the window, else None.

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
        WorkError: it cannot be loaded, tokenizes chats differently, or predicts something else.
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
    (output,) = llama_cpp.run_tasks([task])
    if reference is None:
        _same_chats(job.source, output.chat_ids, chats)
        reason = "llama.cpp runs it and reads chats as training did; predictions are not compared"
        job.console.print(reason)
        return {"skipped": reason}
    result = compare_output(job.source, reference, output, chats)
    _check_distance(job, result.kl_per_token, reference.base_kl, kind, adapter or model)
    return result.as_dict()


def _check_distance(job: Job, kl: float, base_kl: float, kind: str, file: Path) -> None:
    """Refuse a file that is not the tuned model; warn if `kind` loses more than tuning changed.

    Raises:
        WorkError: it predicts something else, or its adapter has no effect.
    """
    largest = LARGEST_KL.get(kind, LARGEST_KL_OTHERS)
    if not kl <= largest:
        raise WorkError(
            f"{file.name}: llama.cpp predicts something else than the adapter (KL {kl:.3g} nats "
            f"per token, at most {largest:g}); it was not kept",
            hint="with --dtype bfloat16 try float16; otherwise please report this model family",
        )
    if kl < base_kl:
        return
    far = f"(KL {kl:.2g} nats per token; the untuned base: {base_kl:.2g})"
    if file.name == ADAPTER_FILE:
        raise WorkError(
            f"{file.name}: with it llama.cpp is not nearer to the tuned model than its base {far}; "
            "it was not kept",
            hint="export the merged model: lorakit export RUN --to gguf",
        )
    job.next_steps.append(
        f"hint: {kind} costs more than the tuning changed {far}: take a larger --quant"
    )


def end_of_turn(source: TunedRun) -> int:
    """Id of the token that ends an answer."""
    return int(source.tokenizer.convert_tokens_to_ids(source.end_of_turn()))


def compare_output(
    source: TunedRun,
    reference: Reference,
    output: llama_cpp.LlamaOutput,
    chats: tuple[list[dict[str, Any]], ...] = (),
) -> Agreement:
    """Compare llama.cpp's predictions along the adapter's answers, and its tokens of the chats.

    Raises:
        WorkError: its template or tokenizer makes other prompts than in training, it does not stop
            at the end of turn, or it predicts NaN.
    """
    _same_chats(source, output.chat_ids, chats)
    if not output.stops:
        raise WorkError(
            f"llama.cpp does not stop at {source.end_of_turn()!r}, which ends an answer; "
            "nothing was kept",
            hint="please report this model's tokenizer",
        )
    pairs = zip(reference.predictions, output.places, strict=True)
    scored = [llama_cpp.scored(rows, places) for rows, places in pairs]
    kl, same, equal, positions = summed(scored, "the file in llama.cpp")
    count = len(output.places)
    notes = {"engine": "llama.cpp (xllamacpp)", "stops_at": source.end_of_turn()}
    return Agreement(kl, same, equal, positions, count, notes)


def _same_chats(
    source: TunedRun, actual: Sequence[list[int]], chats: Sequence[list[dict[str, Any]]]
) -> None:
    """Check that llama.cpp tokenizes each chat as in training.

    Raises:
        WorkError: a chat has other tokens.
    """
    for index, (ids, turns) in enumerate(zip(actual, chats, strict=True), 1):
        expected = prompt_ids(source.tokenizer, [Message(t["role"], t["content"]) for t in turns])
        message = f"llama.cpp reads held-out chat {index} otherwise than in training"
        same_prompt(source.tokenizer, ids, expected, message)


def export_gguf_adapter(job: Job) -> dict[str, Any]:
    """Write the adapter with folded scale as one GGUF file, for `llama-server --lora`.

    Raises:
        ModelError: a GGUF adapter cannot represent it; raised before writing.
        WorkError: llama.cpp with base and adapter predicts something else than the adapter.
    """
    refuse_unportable(job.source)
    with atomic_directory(job.target) as folder:
        facts = fill_gguf_adapter(job, folder)
    more = ("--lora", str(job.target / ADAPTER_FILE))
    line = llama_server(job.source, Path("BASE.gguf"), *more)
    job.next_steps.append(f"serve it with: {shlex.join(line)}")
    base = job.source.run.command("export", "--to", "ollama", "--adapter")
    job.next_steps.append(f"write its base, BASE.gguf, with: {base}")
    return facts


def refuse_unportable(source: TunedRun) -> None:
    """Refuse an adapter that GGUF cannot represent.

    Raises:
        ModelError: gives the reason.
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
        require_adapter_file(path)
        _check_no_path(path, source)
        facts: dict[str, Any] = {"file": path.name, "bytes": path.stat().st_size}
        short = memory_missing(source)
        if not (job.verify and run) or short:
            return {**facts, "skipped": short or "not run in llama.cpp"}
        # The base runs as F16; a QLoRA run was trained on another one, its NF4 values.
        merge_base = "original" if source.recipe.method == "qlora" else "quantized"
        if merge_base == "original":
            job.console.print(
                "note: compared on the original base, as in llama.cpp; this run was trained on its "
                "4-bit values, which --to gguf contains"
            )
        reference = make_reference(source, float32_model(source, merge_base))
        return {
            **facts,
            "merge_base": merge_base,
            **run_gguf(job, reference, base_file, path, "F16"),
        }


def require_adapter_file(path: Path) -> None:
    """Refuse a file that is not an adapter: for Mistral 3 the converter writes the base instead.

    Raises:
        WorkError: gives the type that the file has.
    """
    from gguf import GGUFReader

    kind = GGUFReader(path).fields["general.type"].contents()
    if kind != "adapter":
        raise WorkError(
            f"{path.name}: llama.cpp's converter wrote a {kind}, expected an adapter; not kept",
            hint="export the merged model: lorakit export RUN --to gguf",
        )


def link_weights(folder: Path, target: Path) -> None:
    """Make the weight files of `folder` those of `target` too."""
    for path in folder.glob("*.safetensors*"):
        (target / path.name).symlink_to(path.resolve())


def _check_no_path(path: Path, source: TunedRun) -> None:
    """Check the metadata for local paths, since the converter may write folder names there."""
    from gguf import GGUFReader

    for field in GGUFReader(path).fields.values():
        text = json.dumps(field.contents(), default=str) if field.types else ""
        if str(source.location) in text or str(path.parent) in text:
            raise WorkError(f"{path.name}: {field.name} contains a local path; not kept")
