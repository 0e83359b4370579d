"""The stages of one run, from a resolved recipe to a run directory.

    machine -> tokenizer and data -> plan -> base -> adapter -> train -> save -> evaluate

Stages exchange records (`types.py`) and files of the run directory (`storage/run_dir.py`).
"""

from __future__ import annotations

import datetime
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lorakit.data.chat_template.defaults import prints_today
from lorakit.data.data_notes import data_notes
from lorakit.data.dataset import write_validation
from lorakit.data.inspection import measure_prepared
from lorakit.data.prepare import Prepared, prepare_data
from lorakit.dependencies import require_floors
from lorakit.display.inspection_view import report_view
from lorakit.distributed.process_group import (
    SINGLE_PROCESS,
    DistributedContext,
    init_distributed,
)
from lorakit.errors import LorakitError, RunError
from lorakit.evaluation.answer_store import AnswerStore
from lorakit.evaluation.eval_progress import EvalProgress
from lorakit.evaluation.evaluate_run import RunStores, score_tasks
from lorakit.evaluation.training_scores import TrainingScorer
from lorakit.export.checkpoint_keys import misfit
from lorakit.hardware import MemoryCap, detect_device, measure_context
from lorakit.inference.evaluate import evaluate
from lorakit.model.base_fingerprint import check_base, remember_base
from lorakit.model.eva import eva_weights, set_lora_a
from lorakit.model.expert_settings import expert_notes
from lorakit.model.load import (
    LoadedRun,
    check_vocabulary,
    load_base,
    load_config,
    load_tokenizer,
    locate_model,
    seed_everything,
)
from lorakit.model.loaded_base import take_base
from lorakit.model.lora_config import add_adapter, count_parameters, resolve_targets
from lorakit.model.matching import check_adapter_settings
from lorakit.model.param_counts import count
from lorakit.model.safetensors_io import check_weights
from lorakit.model.start_adapter import (
    find_start,
    resolve_start,
    start_folder,
    tokenizer_location,
    weights_sha256,
)
from lorakit.model.trainable_tokens import check_token_rows, check_tokens_occur, token_rows
from lorakit.model.untrusted import check_adapter, read_object
from lorakit.objects import NO_OBJECTS, Objects
from lorakit.planning.forecast import planned_speed, require_plan_fits
from lorakit.planning.multi_gpu import shared_device
from lorakit.planning.planner import plan_for_data
from lorakit.recipe.loader import ResolvedRecipe
from lorakit.recipe.schema import Recipe
from lorakit.reinforcement.grpo_trainer import GrpoTrainer
from lorakit.reinforcement.held_out import evaluate_rewards
from lorakit.reinforcement.prompt_schedule import PromptRows
from lorakit.reinforcement.rewards import RewardSet
from lorakit.report.page import renew_report
from lorakit.storage.best_record import BestStep
from lorakit.storage.run_dir import RunDir, read_metrics, write_json
from lorakit.storage.run_lock import only_writer
from lorakit.train.best_step import metric_direction
from lorakit.train.callbacks import PauseAtStep
from lorakit.train.checkpoint import load_adapter, require_space, save_adapter, saves_embeddings
from lorakit.train.fsdp import check_launch, shard_base, with_launcher_settings
from lorakit.train.gradient_sync import seed_per_rank
from lorakit.train.oom import oom_as_error
from lorakit.train.progress import TrainingProgress
from lorakit.train.resume import (
    prepare_resume,
    remember_rows,
    resolve_run_dir,
    run_fingerprint,
    truncate_metrics,
    write_run_files,
)
from lorakit.train.signals import catch_signals
from lorakit.train.trainer import LoraTrainer
from lorakit.train.training_args import check_training_settings
from lorakit.types import Device, EvalResult, EvalScore, MemoryPlan

OOM_HINT = "stop other programs on this device, set method: qlora, or use a smaller model"


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """Results of all stages before weights are loaded, as shown by `--dry-run`."""

    resolved: ResolvedRecipe
    location: str
    device: Device
    tokenizer: Any
    prepared: Prepared
    plan: MemoryPlan
    tokens_per_second: float | None
    scorer: TrainingScorer | None = None
    rewards: RewardSet | None = None

    def plan_as_dict(self) -> dict[str, Any]:
        """JSON-ready form, as in `plan.json`."""
        return {**self.plan.as_dict(), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Outcome of a run; `exit_code` is 0, or 128 + signal for a stopped run that can resume."""

    run: RunDir
    steps: int
    train_seconds: float
    final_loss: float | None
    evaluation: EvalResult | None
    exit_code: int = 0
    ranks: int = 1
    unfit: str | None = None  # reason why engines cannot use the adapter on its base
    best: BestStep | None = None  # of a run that compared steps
    paused: EvalScore | None = None  # held-out score of a run that ended at `until`


def prepare_run(
    resolved: ResolvedRecipe,
    console: Console,
    force: bool = True,
    ranks: DistributedContext = SINGLE_PROCESS,
    gpus: int | None = None,
    resume: bool = False,
    tokenizer: Any = None,
) -> PreparedRun:
    """Prepare device, tokenizer, data and plan, with all checks that need no weights.

    Args:
        force: continue even if the plan does not fit into memory.
        ranks: processes that share each step; rank 0 reads and caches before the others.
        gpus: plan for this many GPUs without starting them.
        resume: the adapter that the run started from may be gone.
        tokenizer: used instead of the model's.
    """
    require_floors()
    resolved = resolve_start(resolved, resume)
    local_device = measure_context(detect_device(resolved.recipe.dtype))
    device = shared_device(local_device, ranks)
    device = replace(device, ranks=gpus) if gpus else device
    console.print(f"device   {device.name} ({device.reasons['kind']})")
    visible = torch.cuda.device_count() if device.kind == "cuda" else 0
    if visible > 1 and ranks.world_size == 1 and not gpus:
        console.print(f"         one of {visible} GPUs; --gpus {visible} uses all of them")
    if ranks.world_size > 1:
        console.print(f"ranks    {ranks.world_size} share each step: {device.reasons['ranks']}")
    console.print(f"dtype    {device.dtype}: {device.reasons['dtype']}; adapters float32")
    with ranks.main_process_first():
        return _prologue(resolved, console, force, device, tokenizer)


def _prologue(
    resolved: ResolvedRecipe, console: Console, force: bool, device: Device, tokenizer: Any
) -> PreparedRun:
    recipe = resolved.recipe
    folders = resolved.folders
    location = locate_model(recipe, folders, console.print)
    config = load_config(recipe, location)
    resolved = resolve_targets(resolved, config).derive(device.reasons["dtype"], dtype=device.dtype)
    console.print(
        f"adapters {resolved.recipe.target_modules}: {resolved.origins['target_modules']}"
    )
    if sides := count(config).sides:
        console.print(
            f"frozen   {', '.join(sides)}: outside the text decoder; trained on text only"
        )
    check_adapter_settings(resolved.recipe, config)
    for note in expert_notes(resolved.recipe, config):
        console.print(f"experts  {note}")
    _check_start(resolved.recipe, location, count(config).modules, console)
    if any(Path(location).glob("*.safetensors")):
        check_weights(Path(location))
    if tokenizer is None:
        tokenizer = load_tokenizer(recipe, tokenizer_location(resolved.recipe, location))
    check_token_rows(tokenizer, resolved.recipe, config)
    if recipe.template_date is None and prints_today(str(tokenizer.chat_template)):
        today = datetime.date.today().isoformat()
        resolved = resolved.derive("today, which the chat template prints", template_date=today)
    prepared = prepare_data(resolved.recipe, tokenizer, folders)
    check_tokens_occur(tokenizer, resolved.recipe, prepared.train)
    rewards = scorer = None
    if resolved.recipe.objective == "grpo":
        rewards = RewardSet(resolved.recipe, folders, console.print)
        console.print(f"rewards  {rewards.describe()}")
    if resolved.recipe.eval_tasks:
        scorer = TrainingScorer(resolved.recipe, tokenizer, folders, console.print)
        console.print(f"tasks    {', '.join(scorer.directions)}")
    metric_direction(resolved.recipe, scorer)
    steps = resolved.recipe.total_steps(len(prepared.train))
    check_training_settings(resolved.recipe, device, steps, bool(prepared.val))
    check_launch(resolved.recipe, device)
    console.print(report_view(prepared.report))
    for note in data_notes(prepared.report.as_dict(), resolved.recipe):
        console.print(f"note     {note}")
    longest = prepared.report.longest_example
    planned, plan = plan_for_data(resolved.recipe, config, device, longest)
    has, needs = device.memory_bytes / 2**30, plan.total_bytes / 2**30
    verdict = "" if plan.fits else "; IT DOES NOT FIT"
    console.print(
        f"memory   about {needs:.1f} GiB planned, {has:.1f} GiB here: {plan.describe()}{verdict}"
    )
    speed, why = planned_speed(planned, config, device, plan)
    estimate = f"no estimate, {why}" if speed is None else f"about {speed:,.0f} tokens/s expected"
    console.print(f"speed    {estimate}")
    if not force:
        require_plan_fits(planned, config, device, plan)
    return PreparedRun(
        resolved, location, device, tokenizer, prepared, plan, speed, scorer, rewards
    )


def fit(
    resolved: ResolvedRecipe,
    console: Console,
    resume: bool = False,
    force: bool = False,
    objects: Objects = NO_OBJECTS,
    until: int | None = None,
) -> TrainResult:
    """Train, save and evaluate one run; Ctrl-C and SIGTERM save a checkpoint and return.

    Args:
        resume: continue from the last checkpoint.
        force: train even if the plan does not fit into memory.
        objects: of a Python program, used instead of what the recipe names.
        until: save a checkpoint after this optimizer step, score the held-out rows and return; a
            resume continues from there.

    Raises:
        LorakitError: the recipe, data or model cannot be used (raised before training starts), the
            disk is full, or the run diverged.
    """
    resolved = resolve_start(resolved, resume)
    with init_distributed() as ranks:
        run, resolved = ranks.run_on_main_and_broadcast(
            lambda: resolve_run_dir(with_launcher_settings(resolved), resume)
        )
        if ranks.is_main:
            with only_writer(run, console.print), _report_on_exit(run, console):
                return _fit(run, resolved, console, resume, force, ranks, objects, until)
        silent = Console(file=io.StringIO(), quiet=True)
        return _fit(run, resolved, silent, resume, force, ranks, objects, until)


def _written(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


@contextmanager
def _report_on_exit(run: RunDir, console: Console) -> Iterator[None]:
    """Write the run's report at its end, and also after a fault in a training step."""
    before = _written(run.metrics)
    try:
        yield
    except LorakitError:
        # Before the first step the folder is unchanged.
        if _written(run.metrics) != before:
            renew_report(run, lambda _: None)
        raise
    renew_report(run, console.print)


def _fit(
    run: RunDir,
    resolved: ResolvedRecipe,
    console: Console,
    resume: bool,
    force: bool,
    ranks: DistributedContext,
    objects: Objects,
    until: int | None,
) -> TrainResult:
    start = prepare_run(resolved, console, force, ranks, resume=resume, tokenizer=objects.tokenizer)
    recipe, device, prepared = start.resolved.recipe, start.device, start.prepared
    fingerprint = _fingerprint(run, start, resume, ranks)
    checkpoint = ranks.run_on_main_and_broadcast(
        lambda: _write_run_files(run, start, fingerprint, resume, console)
    )
    _check_shared_filesystem(run, checkpoint, ranks)
    if start.plan.placement.shards > 1 or recipe.fsdp is not None:
        # Host memory holds one complete base; `attach_engine` passes the turn to the next rank.
        ranks.wait_for_load_turn()
    model = _model(start, console, checkpoint is None, objects, ranks)
    if recipe.fsdp is not None:
        with oom_as_error("sharding the base model", OOM_HINT):
            shard_base(model, recipe.fsdp, device)
        ranks.release_load_turn()
    if ranks.is_main:
        require_space(run, recipe, count_parameters(model)[0])
    else:
        recipe = recipe.model_copy(update={"report_to": []})
    progress = TrainingProgress(console, run if ranks.is_main else None, device.kind)
    began = time.perf_counter()
    reported = oom_as_error("placing the model on its device", OOM_HINT)
    with reported, catch_signals(alone=ranks.world_size == 1) as stop:
        trainer = _trainer_class(start)(
            model,
            start.tokenizer,
            recipe,
            device,
            start.plan,
            run,
            prepared.train,
            prepared.val,
            progress,
            stop,
            fingerprint,
            ranks,
            [*objects.callbacks, *([PauseAtStep(until)] if until else [])],
            start.scorer,
        )
        for name, words in trainer.describe().items():
            console.print(f"{name:8} {words}")
        seed_per_rank(recipe.seed, ranks)
        trainer.prepare_reference(resuming=checkpoint is not None)
        try:
            trainer.take_steps(checkpoint, until)
        finally:
            progress.stop()
    seconds = time.perf_counter() - began
    steps, sync = trainer.state.global_step, trainer.sync
    ended = steps >= trainer.state.max_steps
    paused = until is not None and steps >= until and not ended
    stopped = paused or (sync.should_stop and not ended)
    score = trainer.score(prepared.val) if paused and not sync.should_stop else None
    best = None if stopped else trainer.load_best_step()
    preferences = None if stopped else trainer.score_preferences()
    model = trainer.close()
    final_loss = _final_loss(run) if ranks.is_main else None
    if stopped:
        code, count = sync.exit_code, ranks.world_size
        return TrainResult(run, steps, seconds, final_loss, None, code, count, paused=score)
    unfit = _save(run, model, start) if ranks.is_main else None
    if best and ranks.is_main:
        best.write(run)
    evaluation = None
    # A sharded base computes on all ranks; otherwise the other ranks wait for rank 0.
    if prepared.val and (ranks.is_main or trainer.sharded):
        evaluation = _evaluate(run, model, start, ranks, objects, console, preferences)
    return TrainResult(run, steps, seconds, final_loss, evaluation, unfit=unfit, best=best)


def _fingerprint(
    run: RunDir, start: PreparedRun, resume: bool, ranks: DistributedContext
) -> dict[str, Any]:
    """Everything that affects training steps, to compare on a resume."""
    recipe, train, rewards = start.resolved.recipe, start.prepared.train, start.rewards
    return run_fingerprint(
        recipe,
        train,
        start.tokenizer,
        ranks.world_size,
        _start_hash(run, recipe, resume),
        None if rewards is None else rewards.digest(train.content_hashes),
    )


def _trainer_class(start: PreparedRun) -> Callable[..., LoraTrainer]:
    """The trainer of the recipe's objective."""
    if start.rewards is None:
        return LoraTrainer
    prompts = PromptRows(start.prepared.train, start.prepared.train_conversations)
    return partial(GrpoTrainer, rewards=start.rewards, prompts=prompts)


def _save(run: RunDir, model: Any, start: PreparedRun) -> str | None:
    """Write the adapter; return the reason why engines cannot use it, or None."""
    recipe = start.resolved.recipe
    save_adapter(model, start.tokenizer, run.adapter, saves_embeddings(recipe))
    return misfit(run, load_config(recipe, start.location))


def _model(
    start: PreparedRun, console: Console, fresh: bool, objects: Objects, ranks: DistributedContext
) -> Any:
    """Load the base, on the GPU or in host memory as planned, and attach the adapter.

    Args:
        fresh: no checkpoint is loaded afterwards.
        objects: may have a loaded base.
    """
    recipe, device = start.resolved.recipe, start.device
    seed_everything(recipe.seed, recipe.deterministic)
    if recipe.deterministic:
        console.print("bits     equal in each run on this device with these versions; slower")
    MemoryCap(recipe.memory_limit_bytes, device)
    with oom_as_error("loading the base model", OOM_HINT):
        on_host = start.plan.placement.loaded_on_host or recipe.fsdp is not None
        if objects.shared is not None:
            base = objects.shared.take(recipe, start.location, device, on_host)
        elif objects.base is not None:
            base = take_base(objects.base, recipe, start.location, device, on_host)
        else:
            base = load_base(recipe, start.location, device, on_host)
        check_vocabulary(start.tokenizer, base)
        model = add_adapter(base, recipe, token_rows(start.tokenizer, recipe))
    referenced = start.rewards is not None and recipe.beta_value > 0
    if recipe.from_adapter and (fresh or referenced):
        if start_folder(recipe) is None:
            raise RunError(
                f"from_adapter: {recipe.from_adapter} is gone, and "
                + ("this run has no checkpoint yet" if fresh else "beta compares with it"),
                hint="restore the adapter, or start a new run with --output",
            )
        load_adapter(model, Path(recipe.from_adapter))
    elif recipe.init_lora_weights == "eva" and fresh:
        set_lora_a(model, ranks.run_on_main_and_broadcast(lambda: _eva(model, start, console)))
    trainable, total = count_parameters(model)
    console.print(f"training {trainable:,} of {total:,} parameters ({trainable / total:.2%})")
    return model


def _eva(model: Any, start: PreparedRun, console: Console) -> dict[str, torch.Tensor]:
    """Compute lora_A from the data, on the GPU."""
    if start.plan.placement.loaded_on_host:
        raise RunError(
            "init_lora_weights: eva needs the complete base on the GPU, and the plan keeps it in "
            "host memory",
            hint="set init_lora_weights: true, or give the run more GPU memory",
        )
    with oom_as_error("initializing the adapter from data", OOM_HINT):
        weights = eva_weights(model, start.prepared.train, start.resolved.recipe.seed)
    console.print(f"adapter  {len(weights)} layers start from their inputs in the data (EVA)")
    return weights


def _check_start(recipe: Recipe, location: str, modules: Sequence[str], console: Console) -> None:
    """Check the adapter that training starts from, if any, and that it belongs to this base."""
    folder, start = start_folder(recipe), find_start(recipe) if start_folder(recipe) else None
    if folder is None or start is None:
        return
    check_adapter(folder, modules)
    if start.run is not None:
        check_base(start.run, recipe, location)
    console.print(f"start    from the adapter {start.name}{start.trained_on()}")


def _start_hash(run: RunDir, recipe: Recipe, resume: bool) -> str | None:
    """Hash of the weights that training starts from; on a resume the recorded one if absent."""
    if not recipe.from_adapter:
        return None
    if start_folder(recipe):
        return weights_sha256(Path(recipe.from_adapter))
    recorded = read_object(run.start)["sha256"] if resume and run.start.exists() else None
    return None if recorded is None else str(recorded)


def _check_shared_filesystem(
    run: RunDir, checkpoint: str | None, ranks: DistributedContext
) -> None:
    """Check that this rank can read the checkpoint."""
    if checkpoint and not Path(checkpoint).is_dir():
        raise RunError(
            f"{run.path}: rank {ranks.rank} cannot read this folder of rank 0",
            hint="put the run directory on a shared file system: --output",
        )


def _final_loss(run: RunDir) -> float | None:
    losses = [row["loss"] for row in read_metrics(run) if row.get("loss") is not None]
    return losses[-1] if losses else None


def _write_run_files(
    run: RunDir, start: PreparedRun, fingerprint: dict[str, Any], resume: bool, console: Console
) -> str | None:
    """Write the files before training; return the folder of the checkpoint to resume from."""
    recipe, prepared = start.resolved.recipe, start.prepared
    steps = recipe.total_steps(len(prepared.train))
    for earlier in (run.best, run.stopped):
        earlier.unlink(missing_ok=True)
    resumed = prepare_resume(run, fingerprint, prepared.train, steps, console) if resume else None
    if resumed is None:
        run.metrics.unlink(missing_ok=True)
        remember_base(run, recipe, start.location)
        remember_rows(run, prepared.train)
        if found := find_start(recipe):
            write_json(run.start, found.record())
    else:
        check_base(run, recipe, start.location)
        truncate_metrics(run, resumed.step)
    lengths = asdict(measure_prepared(prepared, recipe))
    report, plan = {**prepared.report.as_dict(), "lengths": lengths}, start.plan_as_dict()
    write_run_files(run, start.resolved, report, plan, start.device)
    write_validation(run.validation, prepared.val_conversations)
    return str(resumed.folder) if resumed else None


def _evaluate(
    run: RunDir,
    model: Any,
    start: PreparedRun,
    ranks: DistributedContext,
    objects: Objects,
    console: Console,
    preferences: dict[str, float] | None,
) -> EvalResult:
    rows = start.prepared.val_conversations
    label = start.resolved.recipe.val_data or f"{len(rows)} row{'s' * (len(rows) > 1)} of the data"
    if start.rewards is not None:
        prompts = PromptRows(start.prepared.val, rows)
        result = evaluate_rewards(
            model, start.tokenizer, prompts, start.rewards, start.resolved.recipe, label
        )
    else:
        result = evaluate(
            model,
            start.tokenizer,
            start.prepared.val,
            rows,
            label,
            metrics=objects.metrics,
            note=console.print,
            preferences=preferences,
        )
    if start.scorer is not None:
        loaded = LoadedRun(run, start.resolved.recipe, start.device, model, start.tokenizer)
        stores = RunStores(run, loaded)
        # Ranks that share the base ask together, and only rank 0 writes.
        store_of = stores.of if ranks.world_size == 1 else lambda side, task: AnswerStore()
        tasks, note = start.scorer.listed.tasks, console.print
        scores, _ = score_tasks(tasks, loaded, store_of, EvalProgress(None), note)
        result = replace(result, tasks=tuple(scores), adapter=stores.adapter)
    if ranks.is_main:
        write_json(run.eval, result.as_dict())
    return result
