"""SFTTrainer with complete checkpoints, from which training resumes bit by bit.

transformers writes pickles in place, and resumes with the checkpoint's rate and intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer_callback import ExportableState, TrainerState
from trl import SFTTrainer

from lorakit.distributed.process_group import DistributedContext
from lorakit.errors import WorkError
from lorakit.recipe.schema import Recipe
from lorakit.storage.atomic_dir import CorruptedError, atomic_directory
from lorakit.storage.best_record import BestStep
from lorakit.storage.run_dir import RunDir
from lorakit.train.best_step import evaluations_without_improvement
from lorakit.train.checkpoint import (
    checkpoint_bytes,
    checkpoint_step,
    load_adapter,
    load_state,
    random_state,
    read_checkpoint,
    restore_random,
    restore_schedule,
    rotate,
    save_adapter_files,
    save_state,
    saves_embeddings,
)
from lorakit.train.gradient_sync import assert_parameters_in_sync, seed_per_rank
from lorakit.train.loss import AttachResult


class ResumableTrainer(SFTTrainer):
    """SFTTrainer with lorakit's checkpoints.

    `fingerprint` is compared by a resume, see `train/resume.py`.
    """

    run: RunDir
    recipe: Recipe
    attached: AttachResult
    fingerprint: Mapping[str, Any] | None
    loaded: dict[str, Any]
    ranks: DistributedContext
    trained: list[Any]

    def _send_telemetry(self) -> None:
        """Do nothing; TRL would report the model, the GPU and the kind of data."""

    def take_steps(self, checkpoint: str | None, until: int | None = None) -> None:
        """Train to the end, starting from a checkpoint; one of the last step is only loaded.

        transformers would train one step beyond the last one.

        Args:
            until: the step after which `PauseAtStep` ends this session.
        """
        folder = Path(checkpoint) if checkpoint else None
        if folder is None or not self._is_last(folder, until):
            self.train(resume_from_checkpoint=checkpoint)
            return
        self._load_from_checkpoint(str(folder))
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))

    def _is_last(self, folder: Path, until: int | None) -> bool:
        """True for a checkpoint of the last step, or of the step where training stopped early."""
        if checkpoint_step(folder) >= min(self.args.max_steps, until or self.args.max_steps):
            return True
        patience = self.recipe.early_stopping_patience
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        return patience is not None and evaluations_without_improvement(state) >= patience

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, weights = self.state.global_step, self.accelerator.unwrap_model(self.model)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        assert_parameters_in_sync(self.ranks, self.trained, step)
        facts = {"step": step, "steps": self.state.max_steps, "past": self.fingerprint}
        size = checkpoint_bytes(
            self.recipe, sum(p.numel() for p in weights.parameters() if p.requires_grad)
        )
        randoms = self.ranks.all_gather_object(random_state())
        if self.ranks.is_main:
            with atomic_directory(self.run.checkpoint(step), facts, size) as folder:
                save_adapter_files(weights, folder, saves_embeddings(self.recipe))
                scaler = self.accelerator.scaler
                save_state(folder, self.optimizer, self.lr_scheduler, scaler, randoms)
                self.state.save_to_json(str(folder / "trainer_state.json"))
            best = self.state.best_global_step if self.recipe.compares_steps else None
            rotate(self.run, self.recipe.keep_checkpoints, step, best)

    def load_best_step(self) -> BestStep | None:
        """Make the best step the model, if the recipe asks for it.

        Returns:
            The best step, or None if the run did not compare steps.

        Raises:
            WorkError: the checkpoint of the best step is damaged.
        """
        best, last = self.state.best_global_step, self.state.global_step
        if not self.recipe.compares_steps or not best or self.state.best_metric is None:
            return None
        used = self.recipe.uses_best_step or best == last
        if used and best != last:
            folder = self.run.checkpoint(best)
            try:
                read_checkpoint(folder)
            except CorruptedError as fault:
                raise WorkError(
                    f"{folder}: the checkpoint of the best step is damaged: {fault}",
                    hint="resume with --set load_best_model_at_end=false to keep the last step",
                ) from fault
            self._load_adapter(folder)
        value, metric = float(self.state.best_metric), self.recipe.metric_for_best_model
        return BestStep(best, value, last, used, metric)

    def _load_adapter(self, folder: Path) -> None:
        engine = self.attached.engine
        if engine is not None and engine.host_adapters is not None:
            engine.host_adapters.point_to_host()  # load values and state into host memory
        load_adapter(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._load_adapter(Path(resume_from_checkpoint))
        self.loaded = load_state(Path(resume_from_checkpoint))

    def _init_training_state(self, max_steps: int, *more: Any) -> Any:
        done = super()._init_training_state(max_steps, *more)
        # Intervals of saving, logging and scoring are those of the recipe, not the checkpoint.
        self.state.compute_steps(self.args, max_steps)
        return done

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.load_state_dict(self.loaded.pop("optimizer"))
            restore_schedule(self.lr_scheduler, self.optimizer, self.loaded["scheduler"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.loaded["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(self.loaded["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            randoms = self.loaded["random"]
            if self.ranks.rank < len(randoms):
                restore_random(randoms[self.ranks.rank])
            else:
                seed_per_rank(self.recipe.seed + self.state.global_step, self.ranks)
