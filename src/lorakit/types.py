"""The frozen records that stages hand to one another: no behavior beyond counting and printing.

Shapes: B batch, T tokens. Token ids are plain ints; a label of `IGNORE` (-100) is not trained.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

IGNORE = -100
# Bytes of optimizer state per trained weight.
OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "adamw_8bit": 2.0,
    "paged_adamw_8bit": 2.0,
    "adafactor": 0.5,
    "sgd": 0.0,
}

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from, for every message about it: `train.jsonl:17` (rows count from 1)."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


@dataclass(frozen=True, slots=True)
class Row:
    """One raw record as read from a source, before its format is known."""

    values: dict[str, Any]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    `extra` holds the other keys that chat templates read, as the row has them: `tool_calls`,
    `tool_call_id`, `name`, `reasoning_content`. `train: False` leaves one answer out of the loss.
    """

    role: Role
    content: str
    extra: dict[str, Any] = field(default_factory=dict)
    train: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The `{"role", "content", ...}` form that chat templates take."""
        return {"role": self.role, "content": self.content, **self.extra}


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order: an optional system turn, then user, assistant and tool turns.

    `tools` are the JSON schemas of the functions the model may call, as chat templates take them.
    """

    messages: tuple[Message, ...]
    origin: Origin
    tools: tuple[dict[str, Any], ...] = ()


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
    """

    input_ids: list[int]
    labels: list[int]
    origin: Origin

    @property
    def trained_tokens(self) -> int:
        """How many positions carry a label."""
        return len(self.labels) - self.labels.count(IGNORE)


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of trouble found in the data: what, how often, where first, and what was done."""

    kind: str
    count: int
    first_rows: tuple[str, ...]
    action: str
    spoils: bool = False


@dataclass(frozen=True, slots=True)
class DataReport:
    """What was read, what will be trained, and what was left out and why."""

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
        """Part of the training tokens that carry a label."""
        return self.trained_tokens_train / max(self.tokens_train, 1)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, as in `data_report.json`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Device:
    """The machine a run will use, and the reason for each automatic choice.

    `memory_bytes` is the card's memory, or the host's for a CPU. `dtype` is the storage and
    compute type of the frozen base: "bfloat16", "float16" or "float32". `ranks` processes share
    each step, each with a device like this one, on `nodes` machines; each machine's network is
    taken to carry `network_gbits` a second, unless told. `kernels`: a card runs our Triton kernels.
    `context_bytes`: what CUDA takes outside torch's allocator, where it was measured.
    """

    kind: Literal["cuda", "mps", "cpu"]
    name: str
    memory_bytes: int
    dtype: str
    attention: str
    reasons: dict[str, str] = field(default_factory=dict)
    ranks: int = 1
    nodes: int = 1
    network_gbits: float = 100.0
    kernels: bool = True
    context_bytes: int | None = None

    @property
    def fast(self) -> bool:
        """Whether `fused_layers: auto` puts the fast layers on it."""
        return self.kind == "cuda" and self.kernels

    @property
    def per_node(self) -> int:
        """Ranks of one machine."""
        return self.ranks // self.nodes

    @property
    def rank_bytes(self) -> int:
        """Memory of one rank: processes on a CPU share the host's."""
        return self.memory_bytes // (self.per_node if self.kind == "cpu" else 1)


@dataclass(frozen=True, slots=True)
class Placement:
    """What lies in host memory instead of the card's, and in which order a step is worked.

    `layerwise`: each layer takes all micro-batches of a step before the next one does
    (`engine/layerwise.py`); only then may base and adapters lie on the host. `tokens_at_once` go
    through a layer's products and `heads_at_once` of its keys through attention; the inputs of
    the last `inputs_on_gpu` layers stay on the card. `shards` above 1: so many ranks of a machine
    hold a part each of every layer's frozen weights, gathered when the layer's turn comes.
    """

    layerwise: bool = False
    embedding_on_host: bool = False
    base_on_host: bool = False
    adapters_on_host: bool = False
    inputs_on_gpu: int = 0
    tokens_at_once: int = 0
    heads_at_once: int = 0
    shards: int = 1

    @property
    def base_offloaded(self) -> bool:
        """Layers' frozen weights come to the card by turns."""
        return self.base_on_host or self.shards > 1

    def describe(self, layers: int) -> list[str]:
        """What lies on the host, of a model of so many layers."""
        away = layers - self.inputs_on_gpu if self.layerwise else 0
        inputs = "layer inputs" if away == layers else f"the inputs of {away} layers"
        named = {
            "the base": self.base_on_host,
            "adapters and optimizer": self.adapters_on_host,
            inputs: away > 0,
            "the embedding": self.embedding_on_host,
        }
        return [name for name, there in named.items() if there]


ON_CARD = Placement()


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Predicted bytes per part of a training run, whether they fit, and what that takes.

    `keep` says for each layer what it keeps for backward: 0 all, 1 not gate/up, 2 its input and
    middle, 3 its input alone (`engine/decoder_layer`); a model without fast layers knows 0 and 3.
    `engine`: it is of the fast layers.
    """

    parts: dict[str, int]
    available_bytes: int
    fits: bool
    keep: tuple[int, ...] = ()
    placement: Placement = ON_CARD
    host_parts: dict[str, int] = field(default_factory=dict)
    engine: bool = False

    @property
    def total_bytes(self) -> int:
        """Sum over the parts."""
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        """Sum over what lies in host memory."""
        return sum(self.host_parts.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form, as in `plan.json`."""
        return {**asdict(self), "total_bytes": self.total_bytes, "host_bytes": self.host_bytes}

    def describe(self) -> str:
        """What is recomputed and moved to make it fit, in a few words."""
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
            said.append(f"each layer's weights spread over {self.placement.shards} GPUs")
        on_host = self.placement.describe(len(self.keep))
        said += [f"in host memory: {', '.join(on_host)}"] if on_host else []
        return "; ".join(said) or "nothing recomputed"


@dataclass(frozen=True, slots=True)
class EvalScore:
    """Held-out score over trained tokens only: mean negative log-likelihood in nats, exp of it."""

    loss: float
    perplexity: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One held-out question with the reference and the two models' answers."""

    prompt: str
    reference: str
    base: str
    tuned: str


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Base against tuned on the same held-out tokens, as in `eval.json`."""

    base: EvalScore
    tuned: EvalScore
    data: str
    samples: tuple[Sample, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready form; the same object that `lorakit eval --json` prints."""
        return asdict(self)
