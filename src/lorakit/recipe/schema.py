"""Schema of a recipe: the type, bounds, default and help of each setting.

Each setting is written once, in `Recipe`. The JSON schema, the checks of the command line and the
reference page are derived from it. Loading a recipe reports all its mistakes at once, see
`recipe/loader.py`.
"""

from __future__ import annotations

import datetime
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorakit.recipe.entries import LARGEST as LARGEST
from lorakit.recipe.entries import REQUIRED_KEYS
from lorakit.recipe.entries import EvalTask as EvalTask
from lorakit.recipe.entries import Optimizer as Optimizer
from lorakit.recipe.entries import Positive as Positive
from lorakit.recipe.entries import RewardFunction as RewardFunction
from lorakit.recipe.entries import RewardName as RewardName
from lorakit.recipe.entries import Scheduler as Scheduler
from lorakit.recipe.entries import Source as Source
from lorakit.recipe.entries import Tracker as Tracker
from lorakit.recipe.grpo_keys import GRPO_DEFAULTS as GRPO_DEFAULTS
from lorakit.recipe.grpo_keys import GRPO_KEYS
from lorakit.storage.units import parse_size

# The defaults differ because QLoRA's 4-bit base leaves memory for larger batches, and a higher rank
# and learning rate compensate its quantization error.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "learning_rate": 1e-4,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 8,
    },
    "qlora": {
        "lora_r": 64,
        "lora_alpha": 16,
        "lora_dropout": 0.1,
        "learning_rate": 2e-4,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 4,
    },
}

# Defaults of `beta`, by objective: TRL's, and for SimPO that of its paper (TRL: 0.1).
BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0, "grpo": 0.0}
# Objectives on pairs of a chosen and a rejected answer; KTO's rows have one answer and a label.
PAIR_OBJECTIVES = ("dpo", "ipo", "orpo", "simpo")
PREFERENCE_OBJECTIVES = (*PAIR_OBJECTIVES, "kto")
# Objectives that compare with a reference model.
REFERENCE_OBJECTIVES = ("dpo", "ipo", "kto")
# Log p's of complete answers have steep gradients; dropout blurs the comparison (off in TRL too).
PREFERENCE_DEFAULTS: dict[str, Any] = {"learning_rate": 1e-5, "lora_dropout": 0.0}
# Keys that only some objectives read.
OBJECTIVE_KEYS = {
    "beta": tuple(BETA),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    **dict.fromkeys(GRPO_KEYS, ("grpo",)),
}

# Former names of keys; recipes in run directories may still use them.
RENAMED = {
    "engine": "fused_layers",
    "probe": "memory_probe",
    "streaming": "weight_offload",
    "too_long": "on_overlength",
}
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class Recipe(BaseModel):
    """All settings of a run. Unknown keys are errors; values are never coerced."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="forbid", allow_inf_nan=False, title="lorakit recipe"
    )

    model: str = Field(
        min_length=1,
        description="Base chat model: a hub id, a local folder, or `demo` (SmolLM2-135M-Instruct).",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    from_adapter: str | None = Field(
        None,
        description="Adapter that training starts from, instead of a new one: a run, its adapter "
        "folder, a checkpoint, or a LoRA adapter of peft. `model` and the settings of the adapter "
        "follow from it.",
    )
    method: Literal["lora", "qlora"] = Field(
        "lora", description="`lora`: 16-bit base. `qlora`: base in 4-bit NF4, about a third of it."
    )
    objective: Literal["sft", "dpo", "ipo", "kto", "orpo", "simpo", "grpo"] = Field(
        "sft",
        description="Loss of training. `sft`: imitate the answers. `dpo`, `ipo`, `orpo`, `simpo`: "
        "prefer a chosen answer to a rejected one. `kto`: answers labeled good or bad. `grpo`: "
        "raise the rewards of sampled completions.",
    )
    beta: Annotated[float, Field(ge=0, le=1e3)] | None = Field(
        None,
        description="Strength of the objective as in TRL: a higher one stays closer to the "
        "reference (`dpo`, `ipo`, `kto`), weighs the odds ratio (`orpo`) or scales the rewards "
        "(`simpo`), or weighs the KL to the reference (`grpo`). Default: 0.1; for `simpo` 2.0, "
        "for `grpo` 0.",
    )
    simpo_gamma: Annotated[float, Field(ge=0, le=1e3)] = Field(
        0.5, description="`simpo`: margin of the rewards that a pair should reach."
    )
    desirable_weight: Annotated[float, Field(ge=0, le=1e3)] = Field(
        1.0, description="`kto`: weight of the answers labeled good."
    )
    undesirable_weight: Annotated[float, Field(ge=0, le=1e3)] = Field(
        1.0, description="`kto`: weight of the answers labeled bad."
    )
    reward_funcs: list[RewardName | RewardFunction] = Field(
        default_factory=list,
        description="`grpo`: rewards of a completion, summed by weight: names (exact_answer, "
        "numeric_answer, regex, json_schema, unit_tests, length, judge), or {name: regex, pattern: "
        "..., weight: 0.5}, or {file: mine.py, function: f}.",
    )
    num_generations: Annotated[int, Field(ge=2, le=LARGEST)] = Field(
        8,
        description="`grpo`: completions of each prompt. The examples of an optimizer step count "
        "completions: micro_batch_size x gradient_accumulation_steps is a multiple of it.",
    )
    max_completion_length: Positive = Field(
        512, description="`grpo`: tokens after which a completion is cut."
    )
    max_prompt_length: Positive | None = Field(
        None,
        description="`grpo`: longer prompts are left out and counted. Default: `cutoff_len` minus "
        "`max_completion_length`.",
    )
    temperature: Annotated[float, Field(gt=0, le=100)] = Field(
        1.0, description="`grpo`: of the sampled completions, and of the policy that is trained."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="`grpo`: sample from the likeliest tokens with this total probability."
    )
    top_k: Annotated[int, Field(ge=0, le=LARGEST)] = Field(
        0, description="`grpo`: sample from this number of likeliest tokens; 0 for all."
    )
    loss_type: Literal["dapo", "dr_grpo", "grpo", "bnpo"] = Field(
        "dapo",
        description="`grpo`: the sum over tokens is divided by the tokens of the step (`dapo`, "
        "`bnpo`), by completions x `max_completion_length` (`dr_grpo`), or by the tokens of each "
        "completion (`grpo`).",
    )
    epsilon: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.2, description="`grpo`: lower bound of the ratio of probabilities is 1 - epsilon."
    )
    epsilon_high: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="`grpo`: upper bound is 1 + epsilon_high. Default: `epsilon`."
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="`grpo`: advantages are divided by the standard deviation of the rewards of "
        "their prompt, of the step, or not (Dr. GRPO).",
    )
    num_iterations: Positive = Field(
        1, description="`grpo`: optimizer steps on the completions of a step."
    )
    mask_truncated_completions: bool = Field(
        False, description="`grpo`: leave completions that were cut out of the loss."
    )
    use_bias_correction_kl: bool = Field(
        True,
        description="`grpo` with `beta`: multiply the KL term by the importance ratio, as TRL.",
    )
    importance_sampling_mode: Literal[
        "sequence_mask", "sequence_truncate", "token_mask", "token_truncate"
    ] = Field(
        "sequence_mask",
        description="`grpo`: correction of the difference between sampler and trainer: ratios "
        "above the bound are set to 0 or to the bound, per token or completion.",
    )
    importance_sampling_clip_max: Annotated[float, Field(gt=0, le=LARGEST)] = Field(
        3.0, description="`grpo`: that bound (TRL: vllm_importance_sampling_clip_max)."
    )
    data: str | list[str | Source] = Field(
        description="Training data: a file, folder, glob, address, hub dataset id, or `demo`; or a "
        "list of them, each as it is or with a weight: {source: a.jsonl, weight: 2}."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Which column plays which part, when the names are unusual: "
        "{instruction: my_question, response: my_answer}.",
    )
    system: str | None = Field(None, description="System prompt for conversations without one.")
    strict: bool = Field(
        False, description="Stop at any fault of the data instead of counting it in the report."
    )
    val_data: str | None = Field(None, description="Held-out data; instead of `val_size`.")
    val_size: float | int | None = Field(
        None,
        ge=0,
        le=LARGEST,
        description="Held-out part of `data`: a share below 1, or a number of rows. "
        "Default: 0.05, or none with `val_data`.",
    )
    train_on: Literal["responses", "last", "all"] = Field(
        "responses",
        description="Tokens that carry loss: every answer, the last answer only, or all tokens.",
    )
    train_on_thoughts: bool = Field(
        True,
        description="Whether the thoughts of an answer carry loss, or only what follows them.",
    )
    template_kwargs: dict[str, str | bool | int | float] = Field(
        default_factory=dict,
        description="Variables of the chat template, for training and every later use: "
        "{enable_thinking: true, reasoning_effort: low}.",
    )
    template_date: str | None = Field(
        None,
        description="Date that a template which prints today's writes instead, as 2026-01-31. "
        "Default: the day on which the run begins.",
    )
    cutoff_len: int = Field(2048, ge=8, le=LARGEST, description="Longest example in tokens.")
    on_overlength: Literal["drop_oldest_turns", "split", "drop", "error"] = Field(
        "drop_oldest_turns",
        description="Handling of conversations over `cutoff_len`; an answer is never cut. "
        "`split`: several examples, each answer trained in one.",
    )
    documents: Literal["completion", "instruction"] = Field(
        "completion",
        description="Plain texts: every token trained as plain text, or each piece as the answer "
        "to a request, so that a chat model keeps chatting.",
    )
    document_overlap: Annotated[int, Field(ge=0, le=LARGEST)] = Field(
        64, description="Untrained tokens of the piece before, at the start of a piece of a text."
    )

    lora_r: Positive = Field(description="Rank: capacity of the adapter, and its memory.")
    lora_alpha: Annotated[int | float, Field(gt=0, le=1e30)] = Field(
        description="The update is scaled by lora_alpha / lora_r."
    )
    lora_dropout: Share = Field(description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field(
        "auto",
        description="Layers that get an adapter: `auto` (by model family), `all-linear`, or names.",
    )
    expert_adapters: Literal["none", "shared", "all"] = Field(
        "shared",
        description="Mixtures of experts: `shared`: the layers that every token passes (attention "
        "and shared MLPs); `none`: of these, no MLPs; `all`: every expert too, in PEFT's "
        "`target_parameters`. `none` and `shared` choose among the layers of `target_modules: "
        "auto`; the router is frozen unless `modules_to_save` names it.",
    )
    router_aux_loss_coef: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0,
        description="Weight of the loss that balances tokens over experts (arXiv 2101.03961, "
        "equation 4). Default 0: the router is frozen, and balance is that of its pretraining.",
    )
    use_dora: bool = Field(False, description="Weight-decomposed LoRA: better at low rank, slower.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(lora_r) instead.")
    init_lora_weights: bool | str = Field(
        True, description="How adapters start: true (B = 0), or one of peft's schemes by name."
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="Biases that train too.")
    modules_to_save: list[str] | None = Field(
        None, description="Modules trained in full and saved with the adapter."
    )
    trainable_tokens: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default_factory=list,
        description="Tokens, such as <gate>, that stay one token in turns and whose embedding rows "
        "train. The base has a row for each (peft: trainable_token_indices).",
    )
    rank_pattern: dict[str, Positive] = Field(
        default_factory=dict, description="Rank for modules whose name matches a pattern."
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="Alpha for modules whose name matches a pattern."
    )
    exclude_modules: list[str] | None = Field(None, description="Modules left without adapter.")
    layers_to_transform: list[int] | None = Field(
        None, description="Only these layer numbers get an adapter."
    )
    lora: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of peft's LoraConfig: {lora_bias: true}.",
    )

    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(description="Peak learning rate.")
    loraplus_lr_ratio: Annotated[float, Field(ge=1, le=1e4)] | None = Field(
        None,
        description="LoRA+: the rate of lora_B is `learning_rate` times this, such as 16 "
        "(arXiv 2402.12354). Default: one rate.",
    )
    lr_scheduler: Scheduler = Field(
        "cosine", description="Shape of the rate after warm-up, by transformers' names."
    )
    warmup_ratio: Share = Field(0.03, description="Share of all steps spent warming up.")
    warmup_steps: Annotated[int, Field(ge=0, le=LARGEST)] | None = Field(
        None, description="Steps spent warming up; replaces `warmup_ratio`."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Gradient norm clip.")
    optimizer: Optimizer = Field(
        "adamw",
        description="`adamw`, or another one by transformers' name. `paged_adamw_8bit` saves "
        "adapter memory on CUDA GPUs.",
    )
    epochs: Annotated[float, Field(gt=0, le=LARGEST)] = Field(
        3.0, description="Passes over the data."
    )
    max_steps: Positive | None = Field(None, description="Stop after this many optimizer steps.")
    micro_batch_size: Positive = Field(description="Examples that go through the model at once.")
    gradient_accumulation_steps: Positive = Field(
        description="Micro-batches per optimizer step; memory stays that of one."
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in backward: less memory, about a third slower. "
        "`auto`: as much as the plan needs to fit.",
    )
    memory_limit: str | None = Field(
        None,
        pattern=r"^\d{1,9}(\.\d{1,9})? ?(GiB|GB|MiB|MB)$",
        description="Most memory that a run takes on each GPU, the CUDA context included, such as "
        "15GiB; on a CPU, the memory to plan for. Default: all memory of the device.",
    )
    weight_offload: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Copy frozen weights from host memory layer by layer: `on`, `off`, or `auto` "
        "where nothing else fits. Exactly the same gradients.",
    )
    sharding: Literal["auto", "on", "off"] = Field(
        "auto",
        description="With several GPUs, each holds a part of the frozen weights: `on`, `off`, or "
        "`auto` where one GPU cannot hold all. Exactly the same gradients.",
    )
    fsdp: dict[str, Any] | None = Field(
        None,
        description="Shard the base with torch's FSDP2 over all ranks, for families without fused "
        "layers: {} or {reshard_after_forward: true, cpu_offload: false}.",
    )
    memory_probe: bool | Literal["auto"] = Field(
        "auto",
        description="Run the heaviest micro-batch once before step 1, so that memory runs out "
        "there or not at all. `auto`: on CUDA GPUs.",
    )
    packing: bool = Field(
        True,
        description="Pack the examples of a step without padding; each attends only to itself.",
    )
    fused_layers: Literal["auto", "on", "off"] = Field(
        "auto",
        description="`auto`: lorakit's fused or compiled layers on suitable GPUs, once verified. "
        "`on`: wherever they are supported. `off`: PEFT's layers.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the frozen base; adapters are always float32."
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        42, description="Seed of split, order and dropout."
    )

    deterministic: bool = Field(
        False,
        description="The same bits in each run on the same GPU and versions, at a cost in speed; "
        "a CPU run is always deterministic.",
    )

    output_dir: str | None = Field(
        None, description="Run directory; by default runs/<model>-<method>, numbered if taken."
    )
    save_every: Positive | Annotated[str, Field(pattern=r"^[1-9]\d* ?min$")] = Field(
        100, description="Optimizer steps between checkpoints, or minutes: 10min."
    )
    keep_checkpoints: Positive = Field(2, description="Newest checkpoints to keep.")
    eval_every: Positive | None = Field(
        None, description="Steps between held-out losses in training; the end is always scored."
    )
    eval_tasks: list[str | EvalTask] = Field(
        default_factory=list,
        description="Tasks that are scored every `eval_every` steps and at the end: names or "
        "files with a limit, mine.jsonl:50, or {task: mine.jsonl, limit: 50, metrics: [numeric]}.",
    )
    metric_for_best_model: Annotated[str, Field(pattern=r"^eval_[\w/]+$")] = Field(
        "eval_loss",
        description="Measure by which the best step is chosen: `eval_loss`, or a metric of "
        "`eval_tasks` as in metrics.jsonl, such as eval_mine_numeric.",
    )
    load_best_model_at_end: bool | None = Field(
        None,
        description="Keep the step that is best by `metric_for_best_model` as the result. Needs "
        "`eval_every`. Default: true with `early_stopping_patience`.",
    )
    early_stopping_patience: Positive | None = Field(
        None,
        description="Stop after this many evaluations in a row without a better "
        "`metric_for_best_model`. Needs `eval_every`.",
    )
    log_every: Positive = Field(1, description="Steps between lines of metrics.jsonl.")
    report_to: list[Tracker] = Field(
        default_factory=list,
        description="Trackers that also receive the metrics, by transformers' names.",
    )
    training_args: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of TRL's SFTConfig: {adam_beta2: 0.95, run_name: first}.",
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code that ships with the model. Off: it can do anything."
    )
    offline: bool = Field(False, description="Touch no network; use what is cached.")

    @model_validator(mode="before")
    @classmethod
    def _fill_method_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        method = values.get("method", "lora")
        defaults = METHOD_DEFAULTS.get(method if isinstance(method, str) else "lora", {})
        defaults, objective = defaults or METHOD_DEFAULTS["lora"], values.get("objective")
        if objective in PREFERENCE_OBJECTIVES:
            defaults = {**defaults, **PREFERENCE_DEFAULTS}
        if objective == "grpo":
            defaults = {**defaults, **GRPO_DEFAULTS}
        return {**defaults, **values}

    @model_validator(mode="after")
    def _check_pairs(self) -> Recipe:
        if self.val_data is not None and self.val_size:
            raise ValueError("val_data and val_size both choose the held-out rows; keep one")
        if isinstance(self.val_size, float) and 1 <= self.val_size != int(self.val_size):
            raise ValueError("val_size must be a share below 1 or a whole number of rows")
        if self.template_date is not None:
            try:
                datetime.date.fromisoformat(self.template_date)
            except ValueError:
                raise ValueError(
                    f"template_date is {self.template_date!r}, expected a day as 2026-01-31"
                ) from None
        return self

    @model_validator(mode="after")
    def _check_objective(self) -> Recipe:
        preferring = self.objective in PREFERENCE_OBJECTIVES
        if preferring and self.train_on == "all":
            raise ValueError(
                f"train_on: all has no effect with objective: {self.objective}, which compares "
                "answers; set train_on: responses"
            )
        if preferring and self.router_aux_loss_coef:
            raise ValueError(
                f"router_aux_loss_coef is not supported with objective: {self.objective}; remove it"
            )
        if self.objective == "grpo":
            self._check_grpo()
        for key, objectives in OBJECTIVE_KEYS.items():
            if self.objective not in objectives and getattr(self, key) != _default(key):
                raise ValueError(
                    f"{key} has no effect with objective: {self.objective}; remove it (it belongs "
                    f"to {', '.join(objectives)})"
                )
        return self

    def _check_grpo(self) -> None:
        if self.router_aux_loss_coef:
            raise ValueError("router_aux_loss_coef is not supported with objective: grpo")
        if not self.reward_funcs:
            raise ValueError("objective: grpo needs reward_funcs, such as [numeric_answer]")
        for entry in self.reward_funcs:
            if isinstance(entry, str) and (keys := REQUIRED_KEYS.get(entry)):
                example = ", ".join(f"{key}: ..." for key in keys)
                raise ValueError(f"reward {entry} needs its settings: {{name: {entry}, {example}}}")
        step, group = self.examples_per_step, self.num_generations
        if step % group:
            raise ValueError(
                f"micro_batch_size x gradient_accumulation_steps is {step} completions, expected "
                f"a multiple of num_generations ({group})"
            )
        if self.longest_prompt < 1:
            raise ValueError(
                f"max_completion_length ({self.max_completion_length}) leaves no tokens for a "
                f"prompt within cutoff_len ({self.cutoff_len})"
            )

    @property
    def rewards(self) -> list[RewardFunction]:
        """`reward_funcs`, each with its settings."""
        return [
            RewardFunction.model_validate({"name": entry}) if isinstance(entry, str) else entry
            for entry in self.reward_funcs
        ]

    @property
    def policy_temperature(self) -> float:
        """Number by which logits are divided in the loss: `temperature` with `objective: grpo`."""
        return self.temperature if self.objective == "grpo" else 1.0

    @property
    def longest_prompt(self) -> int:
        """Most tokens of a prompt, with `objective: grpo`."""
        left = self.cutoff_len - self.max_completion_length
        return left if self.max_prompt_length is None else min(left, self.max_prompt_length)

    @property
    def rows_per_step(self) -> int:
        """Rows of the data behind one optimizer step: examples, or the prompts of completions."""
        if self.objective == "grpo":
            return self.examples_per_step // self.num_generations
        return self.examples_per_step

    @property
    def beta_value(self) -> float:
        """`beta`, or the default of the objective."""
        return BETA.get(self.objective, 0.0) if self.beta is None else self.beta

    @property
    def sequences(self) -> int:
        """Sequences of an example in a micro-batch: two for a pair."""
        return 2 if self.objective in PAIR_OBJECTIVES else 1

    @property
    def layers(self) -> str:
        """`fused_layers`, or "off" where FSDP shards the model's own layers."""
        return self.fused_layers if self.fsdp is None else "off"

    @property
    def held_out(self) -> float | int:
        """Share (below 1) or number of rows of `data` to hold out."""
        if self.val_size is not None:
            return self.val_size
        return 0.0 if self.val_data is not None or self.objective == "grpo" else 0.05

    @property
    def sources(self) -> list[str]:
        """Training sources as a list."""
        entries = [self.data] if isinstance(self.data, str) else self.data
        return [entry if isinstance(entry, str) else entry.source for entry in entries]

    @property
    def weights(self) -> list[float]:
        """Weight of each of `sources`."""
        entries = [self.data] if isinstance(self.data, str) else self.data
        return [1.0 if isinstance(entry, str) else entry.weight for entry in entries]

    @property
    def uses_best_step(self) -> bool:
        """True if the result is the best step."""
        if self.load_best_model_at_end is not None:
            return self.load_best_model_at_end
        return self.early_stopping_patience is not None

    @property
    def compares_steps(self) -> bool:
        """True if the best step is kept."""
        return self.uses_best_step or self.early_stopping_patience is not None

    @property
    def kept_checkpoints(self) -> int:
        """Most checkpoints on the disk after a save: the newest ones, and the best one."""
        return self.keep_checkpoints + self.compares_steps

    @property
    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes."""
        return None if self.memory_limit is None else parse_size(self.memory_limit)

    @property
    def save_minutes(self) -> int | None:
        """Minutes between checkpoints, or None if `save_every` counts steps."""
        if isinstance(self.save_every, int):
            return None
        return int(self.save_every.removesuffix("min"))

    def warmup_of(self, steps: int) -> int:
        """Count the warm-up steps of a run of `steps` steps."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(round(self.warmup_ratio * steps), max(0, steps - 1))

    @property
    def examples_per_step(self) -> int:
        """Effective batch: examples behind one optimizer step, over all devices."""
        return self.micro_batch_size * self.gradient_accumulation_steps

    def total_steps(self, examples: int) -> int:
        """Optimizer steps over `examples` examples; the last step of an epoch may be short."""
        if self.max_steps is not None:
            return self.max_steps
        if self.objective == "grpo":  # an epoch's last prompts share a step with the next ones
            rollouts = math.ceil(examples * self.epochs / self.rows_per_step)
            return max(1, rollouts) * self.num_iterations
        per_epoch = math.ceil(examples / self.examples_per_step)
        return max(1, math.ceil(per_epoch * self.epochs))


def _default(key: str) -> Any:
    return Recipe.model_fields[key].get_default(call_default_factory=True)
