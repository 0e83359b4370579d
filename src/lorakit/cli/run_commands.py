"""Commands for a trained run: eval, chat, serve, export, report.

Heavy imports are inside the commands, so that `lorakit --help` is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.app import Json, Offline, Output, RunArgument, app, log, out, print_json
from lorakit.console import quiet


def _is_offline(run: Any) -> bool:
    """Return True if the run's recipe sets `offline`."""
    from lorakit.recipe.loader import load_recipe

    return load_recipe(run.recipe).recipe.offline


@app.command("eval")
def evaluate_run(
    run: RunArgument,
    data: Annotated[
        str | None, typer.Option(help="Data to use instead of the run's held-out rows.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Answers to show side by side.")] = 4,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-eval or files, with a limit: gsm8k:200,mine.jsonl."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="For files: exact_match, contains, numeric, regex[:PATTERN], json, "
            "json_schema:FILE, tool_calls, rouge, FILE.py:FUNCTION."
        ),
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(help="Folder with further task files of lm-eval.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For files and the judge.")] = 256,
    general: Annotated[
        bool, typer.Option("--general/--no-general", help="Check for forgotten general skills.")
    ] = True,
    judge: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Endpoint with OpenAI's routes that compares answers."),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="Model of the judge.")] = None,
    judge_rows: Annotated[int, typer.Option(min=1, help="Questions to judge.")] = 32,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Compare base and tuned: held-out loss, tasks, general skills and answers."""
    from lorakit.storage.run_dir import find_run

    opened = find_run(run)
    quiet(offline or _is_offline(opened))
    from lorakit.display.evaluation_view import evaluation_view
    from lorakit.evaluation.evaluate_run import EvalRequest, evaluate_run
    from lorakit.evaluation.judge import endpoint_of
    from lorakit.reinforcement.held_out import evaluate_held_out

    request = EvalRequest(
        data,
        samples,
        tuple(tasks or ()),
        tuple(metric or ()),
        tuple(include_path or ()),
        general,
        endpoint_of(judge, judge_model),
        judge_rows,
        max_new_tokens,
    )
    result, failed = evaluate_run(opened, request, log, held_out=evaluate_held_out)
    if as_json:
        print_json({**result.as_dict(), "failed": failed})
    else:
        out.print(evaluation_view(result))
    if failed:
        log.print(f"error: not evaluated: {', '.join(failed)} (reasons above)")
        raise typer.Exit(1)


def best_title(run: Any) -> str:
    """Name the step of the adapter, if the run compared steps, for the title of a chat."""
    from lorakit.storage.best_record import best_step

    best = best_step(run)
    return f" (best step: {best.describe()})" if best else ""


@app.command()
def chat(
    run: RunArgument,
    ask: Annotated[str | None, typer.Option(help="Answer one question and exit.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.7,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="Another run on this base; /adapter switches.")
    ] = None,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Talk to a tuned model; /help lists the commands. Works in pipes too."""
    from lorakit.storage.run_dir import find_run

    opened = find_run(run)
    quiet(offline or _is_offline(opened))
    from lorakit.inference.chat import run as run_chat
    from lorakit.inference.generate import GenerationSettings
    from lorakit.model.multi_adapter import MultiAdapterModel

    several = MultiAdapterModel.of(opened, tuple(find_run(path) for path in adapter or ()))
    code = run_chat(
        several,
        title=f"{several.base_name} + {several.active} on {several.loaded.device.name}"
        + best_title(opened),
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
    engine: Annotated[str, typer.Option(help="auto, vllm, llama.cpp or transformers.")] = "auto",
    offline: Offline = False,
) -> None:
    """Start a server with OpenAI's routes and check its answers; for this machine by default."""
    from lorakit.storage.run_dir import find_run

    opened = [find_run(run) for run in runs]
    quiet(offline or _is_offline(opened[0]))
    from lorakit.serve.engines import Place
    from lorakit.serve.main import read_key
    from lorakit.serve.main import serve as serve_runs

    serve_runs(opened, Place(host, port, read_key(api_key, api_key_file)), engine, log)


@app.command("merge", hidden=True)
@app.command()
def export(
    run: RunArgument,
    to: Annotated[
        str,
        typer.Option(help="adapter, merged, gguf, gguf-adapter, ollama, vllm, llama.cpp or hub."),
    ] = "merged",
    output: Output = None,
    quant: Annotated[
        str | None, typer.Option(help="GGUF: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, ...")
    ] = None,
    merge_base: Annotated[
        str, typer.Option(help="QLoRA: merge into the `quantized` base, or the `original`.")
    ] = "quantized",
    dtype: Annotated[str | None, typer.Option(help="Merged: float32, bfloat16, float16.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="vllm, hub: merge first.")] = False,
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
    """Write the tuned model in another format and compare it with the adapter."""
    from lorakit.storage.run_dir import find_run

    opened = find_run(run)
    quiet(offline or _is_offline(opened))
    from lorakit.export.exporters import export_run

    result = export_run(
        opened,
        to,
        output,
        log,
        quant=quant,
        merge_base=merge_base,
        dtype=dtype,
        merged=merged,
        adapter=adapter,
        repo=repo,
        public=public,
        verify=verify,
    )
    if as_json:
        print_json(result)


@app.command()
def report(
    run: RunArgument,
    output: Annotated[
        Path | None, typer.Option(help="File to write instead of the run's report.html.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the run's HTML report: curves, memory, data, answers, exports, how to reproduce."""
    from lorakit.report.page import write_report
    from lorakit.storage.run_dir import find_run

    target = write_report(find_run(run, trained=False), output)
    if as_json:
        print_json({"report": str(target)})
    else:
        out.print(str(target), soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Two or more run directories.")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Also write the comparison as this HTML page.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare runs: curves, settings that differ, and evaluations side by side."""
    from lorakit.report.comparison import compare_runs, write_comparison
    from lorakit.storage.run_dir import find_run

    found = compare_runs([find_run(run, trained=False) for run in runs])
    if output:
        write_comparison(found, output)
        log.print(f"page: {output}")
    if as_json:
        print_json(found.as_dict())
    else:
        out.print(found)
