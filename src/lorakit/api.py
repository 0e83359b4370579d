"""Functions for notebooks and scripts: plan, inspect, finetune and sweep.

    plan(model="llama-2-7b", method="qlora", gpu="t4")        does it fit?
    inspect(model="demo", data="my.jsonl")                    what will be trained?
    run = finetune(model="demo", data="my.jsonl")             train
    run.evaluate(); run.chat("a question"); run.export("gguf"); run.report()

The first argument of each may be a YAML file, a dict or a recipe; keywords override its keys.
The command line calls the same functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakit.console import literal, plain_console, silence_libraries
from lorakit.errors import RecipeError
from lorakit.recipe.loader import RecipeInput, ResolvedRecipe, load_recipe
from lorakit.results import Inspected, Plan
from lorakit.run import Run
from lorakit.sweeps.sweep import Sweep


def finetune(
    recipe: RecipeInput = None,
    *,
    resume: bool = False,
    force: bool = False,
    console: Console | None = None,
    model: Any = None,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    peft_config: Any = None,
    training_args: Any = None,
    callbacks: Sequence[Any] = (),
    metrics: Mapping[str, Callable[[str, str], float]] | None = None,
    **settings: Any,
) -> Run:
    """Train a model with a recipe and return its run.

    Interrupting the cell (or Ctrl-C) finishes the step, saves a checkpoint and returns; the same
    call with `resume=True` continues from it, with bitwise equal results.

    Args:
        recipe: a YAML file, a dict of settings or a recipe; None if `settings` are complete.
        resume: continue from the run's last checkpoint.
        force: train even if the plan does not fit into memory.
        console: prints progress; `Console(quiet=True)` is silent.
        model: name of the base, or a loaded model of transformers: a base, which gets the adapter's
            layers, or a PeftModel, whose adapter training starts from.
        tokenizer: used instead of the model's, and saved with the adapter.
        train_dataset: rows in the same formats as files: a `datasets.Dataset` or `IterableDataset`,
            or a list of dicts. They are written to the cache of prepared data.
        eval_dataset: held-out rows of the same kinds.
        peft_config: a LoraConfig; each of its values becomes a setting.
        training_args: SFTConfig, TrainingArguments or a dict of their fields. Of an object every
            value that changes rows or steps becomes a setting, also one with TRL's default.
        callbacks: transformers' TrainerCallback objects.
        metrics: functions of (answer, reference) by name, which give a number for an answer. The
            means over held-out conversations, of base and tuned, are in `run.evaluation.metrics`.
        settings: keys of a recipe, such as `data`, `method`, `epochs`.

    Raises:
        LorakitError: the recipe, an object, the data or the model cannot be used, the run does not
            fit or diverged, or the disk is full. Its hint gives the fix.
    """
    if isinstance(model, str | Path):
        settings["model"], model = str(model), None
    from lorakit.objects import take_objects
    from lorakit.pipeline import fit
    from lorakit.results import show_outcome

    objects, taken = take_objects(
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        model=model,
        tokenizer=tokenizer,
        peft_config=peft_config,
        training_args=training_args,
        callbacks=callbacks,
        metrics=metrics,
    )
    resolved = load_recipe(recipe, objects=taken, **settings)

    # A notebook keeps plain text on stdout as one output.
    console = console or plain_console(file=sys.stdout, force_jupyter=False, soft_wrap=True)
    with literal(console):
        with silence_libraries(resolved.recipe.offline):
            outcome = fit(resolved, console, resume, force, objects)
        if outcome.exit_code:
            console.print(
                f"stopped after step {outcome.steps}; a checkpoint was saved. Resume with:"
            )
            recipe_file = str(outcome.run.recipe)
            console.print(f"lorakit.finetune({recipe_file!r}, resume=True)", soft_wrap=True)
        else:
            show_outcome(outcome, console, next_steps=False)
    return Run(outcome.run.path)


def sweep(
    recipe: RecipeInput = None,
    *,
    vary: Mapping[str, Any] | None = None,
    seeds: int = 1,
    halving: bool = False,
    trials: int | None = None,
    resume: bool = False,
    force: bool = False,
    console: Console | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    **settings: Any,
) -> Sweep:
    """Train several adapters on one frozen base, and compare them by held-out loss.

    Each run equals the same run alone, bit by bit, and has its own folder. Interrupting the cell
    saves a checkpoint and returns; `sweep(folder, resume=True)` continues.

    Args:
        recipe: a YAML file, a dict of settings or a recipe; with `resume` the sweep's folder.
        vary: values to combine by key, `{"learning_rate": [5e-5, 1e-4], "lora_r": [8, 16]}`, or a
            range to search, `{"learning_rate": "1e-5..1e-3"}`.
        seeds: train each combination with this many seeds, from the recipe's on.
        halving: stop the worse half after parts of the steps.
        trials: number of combinations that Optuna proposes, for ranges.
        resume: continue a stopped sweep; runs that failed are tried again.
        force: train even if a plan does not fit into memory.
        console: prints progress; `Console(quiet=True)` is silent.
        train_dataset: rows of a Python program, as in `finetune`.
        eval_dataset: held-out rows of a Python program.
        settings: keys of a recipe that all runs share; `output_dir` is the sweep's folder.

    Raises:
        LorakitError: a setting cannot vary, or a combination cannot be trained. Runs that fail
            later are recorded in the result, and the others go on.
    """
    from lorakit.sweeps.run_sweep import resume_sweep, start_sweep
    from lorakit.sweeps.sweep_plan import SweepRequest
    from lorakit.sweeps.variations import given_vary

    console = console or plain_console(file=sys.stdout, force_jupyter=False, soft_wrap=True)
    with literal(console):
        if resume:
            folder = _sweep_folder(recipe, settings.get("output_dir"))
            with silence_libraries():
                return Sweep(resume_sweep(folder, console, force).folder.path)
        resolved = _with_datasets(recipe, train_dataset, eval_dataset, settings)
        request = SweepRequest(resolved, given_vary(vary or {}), seeds, halving, trials)
        with silence_libraries(resolved.recipe.offline):
            return Sweep(start_sweep(request, console, force).folder.path)


def _sweep_folder(recipe: RecipeInput, output: Any) -> Path:
    found = output or recipe
    if not isinstance(found, str | Path):
        raise RecipeError("resume needs the folder of a sweep", hint="sweep(folder, resume=True)")
    return Path(found)


def plan(
    recipe: RecipeInput = None,
    *,
    gpu: str | None = None,
    memory: str | None = None,
    gpus: int | None = None,
    nodes: int | None = None,
    network: float | None = None,
    **settings: Any,
) -> Plan:
    """Predict if a run fits, its speed, and changes that make it fit, without loading weights.

    Args:
        recipe: a YAML file, a dict of settings or a recipe; None if `settings` are complete.
            The data is not read and may be omitted.
        gpu: plan for this GPU instead of this machine: "t4", "4090", "a100-80", "h100" ...
        memory: plan for a GPU with this much memory, such as "12GB".
        gpus: number of GPUs per machine.
        nodes: number of machines.
        network: bandwidth of each machine's network in Gbit/s.
        settings: keys of a recipe; `model` may also be a name such as "llama-2-7b".

    Raises:
        LorakitError: the recipe or the model cannot be used, or the GPU is unknown.
    """
    from lorakit.hardware import detect_device
    from lorakit.model.lora_config import resolve_targets
    from lorakit.model.matching import check_adapter_settings
    from lorakit.model.start_adapter import resolve_start
    from lorakit.planning.forecast import find_config, forecast
    from lorakit.planning.gpus import find_gpu, gpu_device, parse_memory, with_gpu_count

    if recipe is None:
        settings = {"data": "not read", **settings}
    resolved = resolve_start(load_recipe(recipe, **settings))
    known = find_gpu(gpu) if gpu else None
    size = parse_memory(memory) if memory else None
    with silence_libraries(resolved.recipe.offline):
        config, source, local = find_config(resolved.recipe, resolved.folders)
    final = resolve_targets(resolved, config).recipe
    check_adapter_settings(final, config)
    device = gpu_device(known, size, final.dtype) if known or size else detect_device(final.dtype)
    device = with_gpu_count(device, gpus, nodes, network)
    return Plan.of(forecast(final, config, device, known, source, local))


def inspect(
    recipe: RecipeInput = None,
    *,
    examples: int = 3,
    say: Callable[[str], None] | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    **settings: Any,
) -> Inspected:
    """Prepare the data as training does and show examples with their loss mask, and every fault.

    Needs the model's tokenizer, not its weights. Faults that would stop a run are counted, not
    raised.

    Args:
        recipe: a YAML file, a dict of settings or a recipe; None if `settings` are complete.
        examples: number of examples to show token by token.
        say: called with a line about each download.
        train_dataset: rows of a Python program, as in `finetune`.
        eval_dataset: held-out rows of a Python program.
        settings: keys of a recipe; `model` and `data` are enough.

    Raises:
        LorakitError: the model or a source cannot be read, or every row is unusable.
    """
    from lorakit.data.inspection import inspect_prepared
    from lorakit.model.load import public_name
    from lorakit.model.start_adapter import resolve_start

    resolved = resolve_start(_with_datasets(recipe, train_dataset, eval_dataset, settings))
    tokenizer, prepared = load_prepared(resolved, say=say, inspecting=True)
    name = public_name(resolved.recipe.model)
    return Inspected.of(inspect_prepared(prepared, tokenizer, resolved.recipe, name, examples))


def prepare(
    recipe: RecipeInput = None,
    *,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    **settings: Any,
) -> Any:
    """Tokenize the data with its loss mask, for a training script of your own.

    The same rows as `finetune` trains, refused for the same faults. Needs the model's tokenizer,
    not its weights.

    Args:
        recipe: a YAML file, a dict of settings or a recipe; None if `settings` are complete.
        tokenizer: used instead of the model's; its chat template may be set or replaced.
        train_dataset: rows of a Python program, as in `finetune`.
        eval_dataset: held-out rows of a Python program.
        settings: keys of a recipe; `model` and `data` are enough.

    Returns:
        A `datasets.DatasetDict` with "train", and "validation" where rows are held out. Columns:
        `input_ids`, `labels` (-100 where a token is not trained), `source` and `row` (from 1). Rows
        are memory-mapped from the cache of prepared data, which `save_to_disk` copies.

    Raises:
        LorakitError: the model or a source cannot be read, no row can be used, or a row would
            spoil the training.
    """
    from datasets import DatasetDict

    resolved = _with_datasets(recipe, train_dataset, eval_dataset, settings)
    _, prepared = load_prepared(resolved, tokenizer)
    parts = {"train": prepared.train, "validation": prepared.val}
    return DatasetDict({name: part.dataset for name, part in parts.items() if len(part)})


def _with_datasets(
    recipe: RecipeInput, train_dataset: Any, eval_dataset: Any, settings: Mapping[str, Any]
) -> ResolvedRecipe:
    from lorakit.objects import take_objects

    _, taken = take_objects(train_dataset=train_dataset, eval_dataset=eval_dataset)
    return load_recipe(recipe, objects=taken, **settings)


def load_prepared(
    resolved: ResolvedRecipe,
    tokenizer: Any = None,
    say: Callable[[str], None] | None = None,
    inspecting: bool = False,
) -> tuple[Any, Any]:
    """Tokenize the data of a recipe; return (tokenizer, data), the model's tokenizer by default."""
    from lorakit.data.prepare import prepare_data
    from lorakit.model.load import load_config, load_tokenizer, locate_model
    from lorakit.model.start_adapter import resolve_start, tokenizer_location

    resolved = resolve_start(resolved)
    folders = resolved.folders
    with silence_libraries(resolved.recipe.offline):
        if tokenizer is None:
            location = locate_model(resolved.recipe, folders, say)
            load_config(resolved.recipe, location)
            tokenizer = load_tokenizer(
                resolved.recipe, tokenizer_location(resolved.recipe, location)
            )
        return tokenizer, prepare_data(resolved.recipe, tokenizer, folders, inspecting)
