"""A run directory as an object: evaluate, chat, export, report, and its files as data."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lorakit.console import literal, plain_console, silence_libraries
from lorakit.recipe.loader import load_recipe
from lorakit.recipe.schema import Recipe
from lorakit.results import Evaluation
from lorakit.storage.run_dir import RunDir, find_run, read_metrics
from lorakit.types import EvalScore, Message, Sample, TaskScore

if TYPE_CHECKING:
    from transformers.trainer_callback import TrainerState

    from lorakit.model.multi_adapter import MultiAdapterModel


_SPOKEN = ("role", "content")


def open_run(path: str | Path) -> Run:
    """Open the finished or stopped run in this folder.

    Raises:
        RunError: the folder does not exist or is not a run.
    """
    return Run(find_run(path, trained=False).path)


class Run:
    """One run; the model is loaded at the first question and kept until `close()`."""

    def __init__(self, path: str | Path) -> None:
        self.folder = RunDir(Path(path))
        self._several: MultiAdapterModel | None = None

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def adapter(self) -> Path:
        """The adapter in PEFT's format: `PeftModel.from_pretrained(base, run.adapter)`."""
        return self.folder.adapter

    @property
    def adapter_path(self) -> str:
        """Path of the adapter's folder as text, as Hugging Face's functions take it."""
        return str(self.folder.adapter)

    @property
    def trainer_state(self) -> TrainerState | None:
        """transformers' TrainerState of the last checkpoint; None before the first one."""
        from transformers.trainer_callback import TrainerState

        kept = self.folder.list_checkpoints()
        if not kept:
            return None
        return TrainerState.load_from_json(str(kept[-1] / "trainer_state.json"))

    @property
    def finished(self) -> bool:
        """True if training has saved its adapter."""
        return self.folder.has_adapter()

    @property
    def recipe(self) -> Recipe:
        """The recipe with every default filled in."""
        return load_recipe(self.folder.recipe).recipe

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl in order: step, loss, learning_rate, grad_norm, tokens ..."""
        return read_metrics(self.folder)

    @property
    def held_out(self) -> list[dict[str, Any]]:
        """Evaluations between steps (`eval_every`): step, eval_loss, eval_perplexity."""
        return read_metrics(self.folder, held_out=True)

    @property
    def evaluation(self) -> Evaluation | None:
        """The last evaluation on the run's held-out rows and on tasks, or None."""
        if not self.folder.eval.exists():
            return None
        value = json.loads(self.folder.eval.read_text(encoding="utf-8"))
        samples = tuple(Sample(**sample) for sample in value["samples"])
        tasks = tuple(TaskScore(**score) for score in value.get("tasks") or ())
        base, tuned = (
            EvalScore(**value[side]) if value.get(side) else None for side in ("base", "tuned")
        )
        metrics, judge = value.get("metrics", {}), value.get("judge")
        return Evaluation(
            base, tuned, value["data"], samples, metrics, tasks, judge, value.get("adapter")
        )

    def evaluate(
        self,
        data: str | Path | None = None,
        samples: int = 4,
        *,
        tasks: str | Sequence[str] = (),
        metrics: str | Sequence[str] = (),
        include_path: str | Path | None = None,
        general: bool = True,
        judge: str | None = None,
        judge_model: str | None = None,
        console: Console | None = None,
    ) -> Evaluation:
        """Compare base and tuned: held-out loss, tasks, general skills and answers.

        A task that cannot run is named on the console, and the others go on.

        Args:
            data: data to use instead of the run's held-out rows.
            samples: number of answers to show.
            tasks: tasks of lm-eval or files, each with an optional limit: "gsm8k:200".
            metrics: metrics of the files, as in `lorakit eval --metric`.
            include_path: folder with further task files of lm-eval.
            general: check for forgotten general skills.
            judge: address with OpenAI's routes whose `judge_model` compares answers.

        Raises:
            LorakitError: the adapter is missing, a task or metric is unknown, or there is nothing
                to evaluate on.
        """
        from lorakit.evaluation.evaluate_run import EvalRequest, evaluate_run
        from lorakit.evaluation.judge import endpoint_of
        from lorakit.reinforcement.held_out import evaluate_held_out

        request = EvalRequest(
            str(data) if data else None,
            samples,
            (tasks,) if isinstance(tasks, str) else tuple(tasks),
            (metrics,) if isinstance(metrics, str) else tuple(metrics),
            (Path(include_path),) if include_path else (),
            general,
            endpoint_of(judge, judge_model),
        )
        console = console or plain_console(file=sys.stdout, force_jupyter=False)
        loaded = self._model().loaded
        with silence_libraries(loaded.recipe.offline), literal(console):
            return Evaluation.of(
                evaluate_run(self.folder, request, console, loaded, evaluate_held_out)[0]
            )

    def chat(
        self,
        question: str | Sequence[Mapping[str, Any]] | None = None,
        *,
        system: str | None = None,
        base: bool = False,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        seed: int | None = None,
    ) -> str | None:
        """Answer one question; without one, chat until /quit.

        Args:
            question: text, or a conversation as `[{"role": "user", "content": "..."}, ...]`.
            system: system prompt; by default the one of the recipe.
            base: answer with the untuned base.
            temperature: 0 gives the same answer each time.
            seed: makes sampled answers reproducible.

        Raises:
            LorakitError: the adapter is missing, or the question exceeds the model's context.
        """
        from lorakit.inference.chat import ChatSession, talk
        from lorakit.inference.generate import GenerationSettings, base_answers, replies

        several = self._model()
        settings = GenerationSettings(max_new_tokens, temperature, seed=seed)
        session = ChatSession(several, system, settings)
        if question is None:
            talk(session, f"{several.base_name} + {several.active}", sys.stdout)
            return None
        turns = _turns(question)
        if turns[0].role != "system":
            turns = [*session.messages, *turns]
        if not base:
            return replies(several.model, session.tokenizer, [turns], settings)[0]
        with base_answers(several.model):
            return replies(several.model, session.tokenizer, [turns], settings)[0]

    def export(
        self,
        to: str = "merged",
        output: str | Path | None = None,
        *,
        console: Console | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Write the tuned model in another format and compare it with the adapter.

        The model that `chat` and `evaluate` have loaded is released first.

        Args:
            to: adapter, merged, gguf, gguf-adapter, ollama, vllm, llama.cpp or hub.
            output: folder to write; by default the run's `export/<format>`.
            options: those of `lorakit export --help`, by the same names: `quant="Q4_K_M"`,
                `merge_base="original"`, `repo="OWNER/NAME"`, `verify=False` ...

        Returns:
            Format, path and comparison: `format`, `path`, `kl_per_token` ...

        Raises:
            LorakitError: the format does not use an option, the folder exists, or the written model
                predicts something else than the adapter (it is then removed).
        """
        from lorakit.export.exporters import export_run

        folder = find_run(self.path)
        self.close()
        console = console or plain_console(file=sys.stdout, force_jupyter=False)
        with silence_libraries(self.recipe.offline), literal(console):
            return export_run(folder, to, Path(output) if output else None, console, **options)

    def push_to_hub(self, repo: str, **options: Any) -> dict[str, Any]:
        """Upload the adapter to a hub repository, "OWNER/NAME"; see `export` for the options."""
        return self.export("hub", repo=repo, **options)

    def report(self, output: str | Path | None = None) -> Path:
        """Write the run's HTML report and return its path, by default `report.html` in its folder.

        Training, `evaluate` and `export` also do. The page is one file that works offline.

        Raises:
            LorakitError: a file of the run is damaged, or the page cannot be written.
        """
        from lorakit.report.page import write_report

        return write_report(self.folder, Path(output) if output else None)

    def close(self) -> None:
        """Release the loaded model and its memory; the next question loads it again."""
        if self._several is None:
            return
        self._several = None
        import gc

        import torch

        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self._state()}>"

    def _state(self) -> str:
        rows = [row for row in self.metrics if row.get("loss") is not None]
        last = f"step {rows[-1]['step']}, loss {rows[-1]['loss']:.4f}" if rows else "no step yet"
        return f"{'trained' if self.finished else 'not finished'}, {last}"

    def _repr_svg_(self) -> str | None:
        """Draw the loss so far for a notebook; None before the first step."""
        from lorakit.display.charts import line_chart
        from lorakit.report.load_run import read_run
        from lorakit.report.page import loss_series

        if not self.folder.has_run():
            return None
        chart = line_chart("Loss", loss_series(read_run(self.folder)))
        return chart.standalone(f"{self.path.name}: {self._state()}") if chart else None

    def _model(self) -> MultiAdapterModel:
        if self._several is None:
            from lorakit.model.multi_adapter import MultiAdapterModel

            folder = find_run(self.path)
            with silence_libraries(self.recipe.offline):
                self._several = MultiAdapterModel.of(folder)
        return self._several


def _turns(question: str | Sequence[Mapping[str, Any]]) -> list[Message]:
    if isinstance(question, str):
        return [Message("user", question)]
    return [
        Message(turn["role"], turn["content"], {k: turn[k] for k in turn if k not in _SPOKEN})
        for turn in question
    ]
