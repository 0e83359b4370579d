"""The `hub` format: a repository on the Hugging Face hub, private by default.

The folder is first made and verified locally, with a model card that lists base, settings, data and
held-out results. The upload uses the token of `hf auth login`, which lorakit never reads, prints or
writes.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from lorakit.errors import RecipeError, WorkError
from lorakit.export.adapter import export_adapter
from lorakit.export.merged import export_merged
from lorakit.export.tuned_run import Job, TunedRun
from lorakit.model.base_class import auto_class
from lorakit.storage.run_dir import read_json, write_text

REPOSITORY = re.compile(r"^[\w.-]+/[\w.-]+$")
# Settings in the model card.
MODEL_CARD_KEYS = (
    *("method", "lora_r", "lora_alpha", "lora_dropout", "learning_rate", "epochs", "max_steps"),
    *("micro_batch_size", "gradient_accumulation_steps", "cutoff_len", "train_on", "seed"),
)


def export_hub(job: Job) -> dict[str, Any]:
    """Write the adapter or the merged model with its model card, then upload it.

    Raises:
        RecipeError: the repository is missing or not of the form owner/name.
        WorkError: the hub refuses or cannot be reached; the folder is kept.
    """
    if not job.repo or not REPOSITORY.match(job.repo):
        given = f" (found: {job.repo})" if job.repo else ""
        raise RecipeError(
            f"--to hub needs the repository to write to{given}",
            hint="name it with --repo OWNER/NAME; it is private unless --public is given",
        )
    facts = export_merged(job) if job.merged else export_adapter(job)
    write_text(job.target / "README.md", card(job.source, job.repo, job.merged))
    address = upload(job.target, job.repo, private=not job.public)
    job.console.print(f"uploaded {address} ({'public' if job.public else 'private'})")
    return {**facts, "repository": job.repo, "private": not job.public}


def upload(folder: Path, repository: str, private: bool) -> str:
    """Create the repository, upload the folder, and return the repository's address.

    Raises:
        WorkError: login, permission or network is missing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=["MANIFEST.json"])
    except Exception as error:  # HTTP, network and file errors have many types
        status = getattr(getattr(error, "response", None), "status_code", None)
        refused = status in (401, 403) or type(error).__name__ == "LocalTokenNotFoundError"
        if refused:
            reason, hint = "no login with write access", "run: hf auth login"
        elif isinstance(error, HfHubHTTPError):
            reason, hint = f"the hub answered with status {status}", "try again later"
        else:
            reason, hint = "the hub cannot be reached", "connect, and omit --offline"
        raise WorkError(
            f"--to hub: {repository}: {reason}; the folder is ready at {folder}",
            hint=f"{hint}; then: {shlex.join(['hf', 'upload', repository, str(folder)])}",
        ) from error
    return str(address)


def card(source: TunedRun, repository: str, merged: bool) -> str:
    """Write the model card: base, usage, settings, data, results and license."""
    is_hub_id = source.base_name.count("/") == 1
    head = {"library_name": "transformers" if merged else "peft", "pipeline_tag": "text-generation"}
    if is_hub_id:
        head["base_model"] = source.base_name
        head["base_model_relation"] = "finetune" if merged else "adapter"
    lines = ["---", *(f"{k}: {v}" for k, v in head.items()), "tags: [lora, lorakit]", "---", ""]
    form = "merged into its base" if merged else "as an adapter"
    lines += [f"# {repository.split('/')[1]}", ""]
    lines += [
        f"`{source.base_name}`, fine-tuned with lorakit, {form}.",
        "",
        _usage(repository, merged, source),
    ]
    lines += ["## Training", "", "| setting | value |", "|---|---|"]
    values = source.recipe.model_dump()
    lines += [f"| {k} | {values[k]} |" for k in MODEL_CARD_KEYS if values[k] is not None]
    lines += ["", *_data_lines(source), *_metric_lines(source)]
    lines += [
        "## License",
        "",
        f"The license of `{source.base_name}` governs this model too, and the terms of the data it "
        "was trained on; read both before use.",
        "",
    ]
    return "\n".join(lines)


def _usage(repository: str, merged: bool, source: TunedRun) -> str:
    auto = auto_class(source.config).__name__
    if merged:
        code = f'model = {auto}.from_pretrained("{repository}")'
    else:
        code = (
            f'base = {auto}.from_pretrained("{source.base_name}")\n'
            f'model = PeftModel.from_pretrained(base, "{repository}")'
        )
    return f"```python\n{code}\n```\n"


def _data_lines(source: TunedRun) -> list[str]:
    report = read_json(source.run.data_report)
    if not report:
        return []
    return [
        "## Data",
        "",
        f"{report['examples_train']:,} examples for training with "
        f"{report['trained_tokens_train']:,} trained tokens of {report['tokens_train']:,}; "
        f"{report['examples_val']:,} held out.",
        "",
    ]


def _metric_lines(source: TunedRun) -> list[str]:
    scores = read_json(source.run.eval)
    if not scores:
        return []
    base, tuned = scores["base"], scores["tuned"]
    return [
        "## Held-out results",
        "",
        "| | loss | perplexity |",
        "|---|---|---|",
        f"| base | {base['loss']:.4f} | {base['perplexity']:.2f} |",
        f"| tuned | {tuned['loss']:.4f} | {tuned['perplexity']:.2f} |",
        "",
    ]
