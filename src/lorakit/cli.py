"""Arguments enter; files, tables or one JSON object leave. Exit 0 done, 1 fault, 2 bad input.

Heavy imports live inside the commands, so that `lorakit --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lorakit.errors import LorakitError, RecipeError

app = typer.Typer(
    name="lorakit",
    help="Fine-tune open chat models with LoRA and QLoRA.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
log = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, such as runs/demo-lora.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Offline = Annotated[bool, typer.Option("--offline", help="Touch no network.")]
Method = Annotated[str | None, typer.Option(help="lora or qlora.")]
Output = Annotated[Path | None, typer.Option(help="Folder to write into.")]


@app.command()
def demo(method: Method = "lora", output: Output = None, as_json: Json = False) -> None:
    """Fine-tune a real small chat model on this CPU, in minutes, and show what changed."""
    from lorakit.demo import demo_recipe

    _train(demo_recipe(method or "lora", output), resume=False, as_json=as_json, next_steps=True)


@app.command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML); flags may replace it.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or `demo`.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="File or hub data set; repeatable.")
    ] = None,
    method: Method = None,
    output: Annotated[str | None, typer.Option(help="Run directory.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; stop.")] = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model: recipe and flags in, a run directory out."""
    from lorakit.recipe_file import load_recipe

    flags: dict[str, Any] = {"model": model, "method": method, "output_dir": output}
    flags["data"] = data[0] if data and len(data) == 1 else data or None
    flags["offline"] = True if offline else None
    resolved = load_recipe(recipe, set_ or [], flags)
    if dry_run:
        _quiet(resolved.recipe.offline)
        from lorakit.finetune import prepare_run
        from lorakit.preview import show_prologue

        show_prologue(prepare_run(resolved, log), out, as_json)
        return
    _train(resolved, resume, as_json, next_steps=True)


@app.command()
def inspect(
    source: Annotated[
        list[str], typer.Argument(metavar="DATA", help="Files or hub data sets, or a recipe.yaml.")
    ],
    model: Annotated[str | None, typer.Option(help="Hub id, folder, or `demo`.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Examples to show token by token.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Also write one page with all of it.")] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Show what will be trained, token by token, and every fault. Loads no weights."""
    from lorakit.recipe_file import load_recipe

    recipe = Path(source[0]) if source[0].endswith((".yaml", ".yml")) else None
    flags: dict[str, Any] = {"model": model, "offline": True if offline else None}
    if recipe is None or len(source) > 1:
        flags["data"] = source[0] if len(source) == 1 else source[recipe is not None :]
    resolved = load_recipe(recipe, set_ or [], flags)
    _quiet(resolved.recipe.offline)
    from lorakit.data.page import write_page
    from lorakit.data.show import show_inspection
    from lorakit.inspect import inspect_data

    found = inspect_data(resolved, log, examples)
    if html:
        write_page(found, html)
    if as_json:
        _print_json(found.as_dict())
    else:
        show_inspection(found, out)
    if html:
        log.print(f"page     {html}", markup=False)
    raise typer.Exit(1 if found.stopping else 0)


@app.command("eval")
def evaluate_run(
    run: Run,
    data: Annotated[
        str | None, typer.Option(help="Other held-out data than the run's own.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Answers to show side by side.")] = 4,
    as_json: Json = False,
) -> None:
    """Held-out loss and perplexity of base and tuned, and their answers side by side."""
    from lorakit.run_dir import open_run

    opened = open_run(run)
    _quiet()
    from lorakit.evaluate import evaluate_loaded, show
    from lorakit.model.load import load_run

    result = evaluate_loaded(load_run(opened), data, samples)
    if as_json:
        _print_json(result.as_dict())
    else:
        show(result, out)


@app.command()
def chat(
    run: Run,
    ask: Annotated[str | None, typer.Option(help="Answer one question and end.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="Another run on this base; /adapter switches.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Talk to a tuned model; /help lists the commands. Works in pipes too."""
    from lorakit.run_dir import open_run

    opened = open_run(run)
    _quiet()
    from lorakit.chat import run as run_chat
    from lorakit.generate import GenerationSettings
    from lorakit.model.several import Several

    several = Several.of(opened, tuple(open_run(path) for path in adapter or ()))
    code = run_chat(
        several,
        title=f"{several.base_name} + {several.active} on {several.loaded.device.name}",
        system=system,
        settings=GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature),
        as_json=as_json,
        question=ask,
    )
    raise typer.Exit(code)


@app.command()
def serve(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Runs on one base; each is a model.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(help="Key that requests must bring.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key.")] = None,
    engine: Annotated[str, typer.Option(help="auto, vllm or embedded.")] = "auto",
    offline: Offline = False,
) -> None:
    """Answer over OpenAI-compatible routes, on this machine only unless told otherwise."""
    from lorakit.run_dir import open_run

    opened = [open_run(run) for run in runs]
    _quiet(offline)
    from lorakit.serve.start import Place, read_key
    from lorakit.serve.start import serve as serve_runs

    serve_runs(opened, Place(host, port, read_key(api_key, api_key_file)), engine, log)


@app.command()
def export(
    run: Run,
    to: Annotated[
        str,
        typer.Option(
            help="adapter, merged, gguf, gguf-adapter, ollama, vllm, tgi, llama.cpp or hub."
        ),
    ] = "merged",
    output: Output = None,
    quant: Annotated[
        str | None, typer.Option(help="GGUF: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, ...")
    ] = None,
    onto: Annotated[
        str, typer.Option(help="QLoRA: merge onto the base as `trained`, or `original`.")
    ] = "trained",
    dtype: Annotated[str | None, typer.Option(help="Merged: float32, bfloat16, float16.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="vllm, tgi, hub: merge first.")] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="ollama: base and adapter in two files.")
    ] = False,
    repo: Annotated[str | None, typer.Option(help="hub: OWNER/NAME.")] = None,
    public: Annotated[bool, typer.Option("--public", help="hub: not private.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare with the adapter.")
    ] = True,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Write the tuned model in another form and compare what was written with the adapter."""
    from lorakit.run_dir import open_run

    opened = open_run(run)
    _quiet(offline)
    from lorakit.export.table import export_run

    result = export_run(
        opened,
        to,
        output,
        log,
        quantization=quant,
        onto=onto,
        dtype=dtype,
        merged=merged,
        as_adapter=adapter or None,
        repository=repo,
        public=public,
        verify=verify,
    )
    if as_json:
        _print_json(result)


@app.command()
def bench(
    shape: Annotated[str, typer.Option(help="Model shape, such as llama-2-7b.")] = "llama-2-7b",
    method: Annotated[str, typer.Option(help="lora or qlora.")] = "lora",
    seq: Annotated[int, typer.Option(min=8, help="Tokens per example.")] = 2048,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's.")] = None,
    accumulation: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps, first ones untimed.")] = 8,
    lengths: Annotated[str, typer.Option(help="fixed, or mixed like instruction data.")] = "fixed",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Label for the result.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    """What this card does: tokens/s and peak memory, random weights, no download. JSON out."""
    _quiet(offline=True)
    from lorakit.bench import run_bench
    from lorakit.run_dir import write_json

    if lengths not in ("fixed", "mixed"):
        raise RecipeError(f"--lengths {lengths}: unknown", hint="fixed or mixed")
    result = run_bench(
        shape, method, seq, micro_batch, accumulation, steps, set_ or [], id_, log, lengths
    )
    if output:
        write_json(output, result)
    _print_json(result)


@app.command()
def schema() -> None:
    """JSON schema of a recipe, for editors."""
    from lorakit.recipe_file import recipe_schema

    _print_json(recipe_schema())


def main() -> None:
    """Entry point: a LorakitError is one message and an exit code; bugs keep their traceback."""
    try:
        app()
    except LorakitError as error:
        log.print(f"error: {error.message}", markup=False)
        if error.hint:
            log.print(f"hint: {error.hint}", markup=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        log.print("stopped")
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not a fault.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _train(resolved: Any, resume: bool, as_json: bool, next_steps: bool) -> None:
    _quiet(resolved.recipe.offline)
    from lorakit.finetune import fit
    from lorakit.preview import show_outcome

    outcome = fit(resolved, log, resume)
    show_outcome(outcome, log if as_json else out, next_steps and not as_json)
    if as_json:
        _print_json(
            {
                "run": str(outcome.run.path),
                "steps": outcome.steps,
                "train_seconds": round(outcome.train_seconds, 2),
                "final_loss": outcome.final_loss,
                **(outcome.evaluation.as_dict() if outcome.evaluation else {}),
            }
        )
    raise typer.Exit(outcome.exit_code)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _quiet(offline: bool = False) -> None:
    """Keep the libraries' own chatter off the screen; `--offline` closes their network too."""
    import logging
    import warnings

    if offline:
        # These are read once, when the libraries are imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "accelerate", "peft", "trl", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
