"""Frozen records that stages exchange, without behavior beyond counting and formatting.

Shapes: B batch, T tokens. Token ids are plain ints; positions with the label `IGNORE` (-100) are
not trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

IGNORE = -100
# Bytes of optimizer state per trained weight.
OPTIMIZER_BYTES = {
    "adafactor": 0.5,
    "adagrad": 4.0,
    "adamw": 8.0,
    "adamw_8bit": 2.0,
    "ademamix": 12.0,
    "ademamix_8bit": 3.0,
    "grokadamw": 12.0,
    "lion_32bit": 4.0,
    "lion_8bit": 1.0,
    "paged_adamw_32bit": 8.0,
    "paged_adamw_8bit": 2.0,
    "paged_ademamix_32bit": 12.0,
    "paged_ademamix_8bit": 3.0,
    "paged_lion_32bit": 4.0,
    "paged_lion_8bit": 1.0,
    "rmsprop": 4.0,
    "schedule_free_adamw": 8.0,
    "schedule_free_radam": 8.0,
    "schedule_free_sgd": 4.0,
    "sgd": 0.0,
    "stable_adamw": 8.0,
}

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Source and number of a row, as in messages: `train.jsonl:17` (rows count from 1)."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


@dataclass(frozen=True, slots=True)
class Row:
    """One raw record of a source, before its format is detected."""

    values: dict[str, Any]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `extra` holds the row's other keys that chat templates read: `tool_calls`, `tool_call_id`,
    `name`, `reasoning_content`. `train: False` excludes one answer from the loss.
    """

    role: Role
    content: str
    extra: dict[str, Any] = field(default_factory=dict)
    train: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Return the `{"role", "content", ...}` form for chat templates."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order: an optional system turn, then user, assistant and tool turns.

    `tools` are the JSON schemas of the functions that the model may call. In preference data
    `rejected` is the same conversation with a worse end, or `good` judges the answer (KTO).
    """

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()
    rejected: tuple[Message, ...] = ()
    good: bool | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns that are not trained on: those before the first trained answer."""
        trained = (i for i, m in enumerate(self.messages) if m.role == "assistant" and m.train)
        return self.messages[: next(trained, len(self.messages))]


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, trained in full as a completion."""

    text: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized training example: `input_ids` [T], `labels` [T], IGNORE where not trained.

    `labels[i]` is the id at position i itself (the shift by one happens in the loss), and
    `labels[0]` is always IGNORE because nothing predicts the first token.

    A preference pair is one example: the chosen sequence up to `second`, then the rejected one. An
    example of KTO has `good`, and after `second` its prompt with the answer of another row.
    `reference` has the log-probability of each sequence under the reference model.
    """

    input_ids: list[int]
    labels: list[int]
    origin: Origin
    second: int = 0
    good: bool | None = None
    reference: tuple[float, ...] = ()

    @property
    def sequences(self) -> tuple[Example, ...]:
        """The sequences, each as an example of its own."""
        if not self.second:
            return (self,)
        cut, origin = self.second, self.origin
        return (
            Example(self.input_ids[:cut], self.labels[:cut], origin),
            Example(self.input_ids[cut:], self.labels[cut:], origin),
        )

    @property
    def trained_tokens(self) -> int:
        """Number of positions with a label."""
        return len(self.labels) - self.labels.count(IGNORE)


@dataclass(frozen=True, slots=True)
class ScoredExample(Example):
    """An example with numbers for each of its trained tokens, such as advantages.

    `token_values` has lists of one number per trained token, with the same names in all examples
    of a step, which begin with `token_`; a micro-batch has them as float32 tensors, in the order of
    its targets.
    """

    token_values: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault in the data: its count, first rows, and the action taken."""

    kind: str
    count: int
    first_rows: tuple[str, ...]
    action: str
    spoils: bool = False


@dataclass(frozen=True, slots=True)
class DataReport:
    """Counts of read, trained and held-out data, and the faults that were found."""

    sources: tuple[dict[str, Any], ...]
    rows_read: int
    examples_train: int
    examples_val: int
    tokens_train: int
    trained_tokens_train: int
    tokens_val: int
    trained_tokens_val: int
    longest_example: int
    cutoff_len: int
    template: str
    faults: tuple[Fault, ...] = ()

    @property
    def trained_share(self) -> float:
        """Fraction of the training tokens that have a label."""
        return self.trained_tokens_train / max(self.tokens_train, 1)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, as in `data_report.json`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Device:
    """The device of a run, and the reason for each automatic choice.

    `memory_bytes` is the GPU's memory, or the host's for a CPU. `dtype` is the storage and compute
    type of the frozen base: "bfloat16", "float16" or "float32". `ranks` processes share each step,
    each with a device like this one, on `nodes` machines with a network of `network_gbits` Gbit/s
    each. `kernels`: the GPU runs our Triton kernels. `context_bytes`: measured memory of CUDA
    outside torch's allocator, or None.
    """

    kind: Literal["cuda", "mps", "cpu"]
    name: str
    memory_bytes: int
    dtype: str
    reasons: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    nodes: int = 1
    network_gbits: float = 100.0
    kernels: bool = True
    context_bytes: int | None = None

    @property
    def fast(self) -> bool:
        """True if `fused_layers: auto` uses the fused layers on it."""
        return self.kind == "cuda" and self.kernels

    @property
    def per_node(self) -> int:
        """Number of ranks on one machine."""
        return self.ranks // self.nodes

    @property
    def rank_bytes(self) -> int:
        """Memory of one rank; processes on a CPU share the host's memory."""
        return self.memory_bytes // (self.per_node if self.kind == "cpu" else 1)


@dataclass(frozen=True, slots=True)
class Placement:
    """Tensors kept in host memory instead of GPU memory, and the schedule of a step.

    `layerwise`: all micro-batches of a step pass a layer before the next one
    (`engine/layerwise.py`); base and adapters can be in host memory only with it. A layer computes
    its products for `tokens_at_once` tokens and attention for `heads_at_once` key heads at a time;
    the inputs of the last `inputs_on_gpu` layers stay on the GPU. With `shards` above 1, that many
    ranks of a machine each hold a part of every layer's frozen weights, gathered for the layer.
    `experts_on_host`: of a model's own layers, only the frozen experts are copied layer by layer.
    """

    layerwise: bool = False
    embedding_on_host: bool = False
    base_on_host: bool = False
    adapters_on_host: bool = False
    inputs_on_gpu: int = 0
    tokens_at_once: int = 0
    heads_at_once: int = 0
    shards: int = 1
    experts_on_host: bool = False

    @property
    def base_offloaded(self) -> bool:
        """True if the layers' frozen weights are copied to the GPU one layer at a time."""
        return self.base_on_host or self.shards > 1

    @property
    def loaded_on_host(self) -> bool:
        """True if the base is loaded into host memory, to be placed from there."""
        return self.base_offloaded or self.experts_on_host

    def describe(self, layers: int) -> list[str]:
        """List the parts in host memory, for a model with this many layers."""
        away = layers - self.inputs_on_gpu if self.layerwise else 0
        inputs = "layer inputs" if away == layers else f"the inputs of {away} layers"
        named = {
            "the base": self.base_on_host,
            "experts": self.experts_on_host,
            "adapters and optimizer": self.adapters_on_host,
            inputs: away > 0,
            "the embedding": self.embedding_on_host,
        }
        return [name for name, on_host in named.items() if on_host]


ON_GPU = Placement()


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Predicted bytes per part of a training run, if they fit, and the settings for it.

    `keep` has the activations that each layer keeps for backward: 0 all, 1 all but gate/up, 2 its
    input and middle, 3 only its input (`engine/decoder_layer`); without fused layers only 0 and 3
    occur. `engine`: the plan is for fused layers.
    """

    parts: dict[str, int]
    available_bytes: int
    fits: bool
    keep: tuple[int, ...] = ()
    placement: Placement = ON_GPU
    host_parts: dict[str, int] = field(default_factory=dict)
    engine: bool = False

    @property
    def total_bytes(self) -> int:
        """Sum over the parts."""
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        """Sum over the parts in host memory."""
        return sum(self.host_parts.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, as in `plan.json`."""
        return {**asdict(self), "total_bytes": self.total_bytes, "host_bytes": self.host_bytes}

    def describe(self) -> str:
        """Summarize activation checkpointing, sharding and offload."""
        said = []
        if self.placement.layerwise:
            said.append("layer by layer, all recomputed but the last product")
        else:
            inside = "all but the last product" if self.engine else "all"
            names = ("nothing", "gate/up", "attention and gate/up", inside)
            counts = {level: self.keep.count(level) for level in sorted(set(self.keep))}
            said += [
                f"{names[level]} recomputed in {count} layer{'s' * (count != 1)}"
                for level, count in counts.items()
                if level
            ]
        if self.placement.shards > 1:
            said.append(f"each layer's weights sharded over {self.placement.shards} GPUs")
        on_host = self.placement.describe(len(self.keep))
        said += [f"in host memory: {', '.join(on_host)}"] if on_host else []
        return "; ".join(said) or "nothing recomputed"


@dataclass(frozen=True, slots=True)
class EvalScore:
    """Held-out score over trained tokens: mean negative log-likelihood in nats, and its exp."""

    loss: float
    perplexity: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out question with the reference and the answers of base and tuned."""

    prompt: str
    reference: str
    base: str
    tuned: str


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Mean of one metric of a task for base and tuned, over the same rows.

    `low` and `high` bound the change (tuned minus base) with 95% confidence, from the differences
    of the rows; None where a metric is no mean over rows. `failed` rows are left out of all means.
    """

    task: str
    metric: str
    rows: int
    base: float
    tuned: float
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True
    failed: int = 0

    @property
    def change(self) -> float:
        """Tuned minus base."""
        return self.tuned - self.base

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the interval excludes no change, else `unclear`."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "unclear"
        return "better" if (self.low > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Scores of base and tuned on the same rows, as in `eval.json`.

    `base` and `tuned` are the held-out losses; None if no rows are held out. `judge` has the counts
    of a pairwise comparison. `adapter` is the hash of the weights that were evaluated. For
    preference data the losses are those of the chosen answers, and `preferences` has the loss,
    rewards and accuracy of the tuned model.
    """

    base: EvalScore | None
    tuned: EvalScore | None
    data: str
    samples: tuple[Sample, ...] = ()
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    tasks: tuple[TaskScore, ...] = ()
    judge: dict[str, Any] | None = None
    adapter: str | None = None
    preferences: dict[str, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON-ready form, as printed by `lorakit eval --json`."""
        return asdict(self)
