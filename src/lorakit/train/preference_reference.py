"""Compute log-probabilities of answers, and keep those of the reference model.

The reference is the model as training starts: the base, since a new adapter changes nothing, or
the base with the adapter that training starts from. Its values are computed once, before the first
step, and kept in `reference.safetensors` of the run, so a step costs one forward and backward pass.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lorakit.data.batching import collate
from lorakit.distributed.process_group import SINGLE_PROCESS, DistributedContext
from lorakit.errors import WorkError
from lorakit.model.eval_mode import device_of
from lorakit.storage.run_dir import write_bytes
from lorakit.train.eval_loss import scoring, too_long
from lorakit.train.oom import run_catching_oom
from lorakit.types import IGNORE, Example

# Tokens that go through the model at once.
BATCH_TOKENS = 8192
# Examples in memory at once.
BLOCK = 1024
SECONDS_BETWEEN_NOTES = 30.0


def silent(_: str) -> None:
    """Print nothing."""


def sequence_logps(
    model: Any, sequences: Sequence[Example], pad_id: int, batch_tokens: int = BATCH_TOKENS
) -> NDArray[np.float32]:
    """Summed log-probability of the trained tokens of each sequence, float32 [N].

    Sequences of similar lengths go through the model together; a batch that runs out of memory is
    halved.

    Raises:
        WorkError: one sequence alone runs out of memory.
    """
    sizes = [len(s.input_ids) for s in sequences]
    order = sorted(range(len(sequences)), key=lambda i: (-sizes[i], i))
    logps, start = np.zeros(len(sequences), np.float32), 0
    with scoring(model):
        while start < len(order):
            chosen = order[start : start + max(1, batch_tokens // sizes[order[start]])]
            rows = [sequences[i] for i in chosen]
            found, fault = run_catching_oom(functools.partial(_logps, model, rows, pad_id))
            if found is None:
                if len(rows) == 1:
                    raise too_long(rows[0], fault)
                batch_tokens = sizes[order[start]] * (len(rows) // 2)
                continue
            logps[chosen] = found
            start += len(rows)
    return logps


def _logps(model: Any, rows: Sequence[Example], pad_id: int) -> NDArray[np.float32]:
    batch = {k: v.to(device_of(model)) for k, v in collate(rows, pad_id).items()}
    losses = model(**batch, use_cache=False, per_token=True).token_losses
    parts = losses.split([row.trained_tokens for row in rows])
    return torch.stack([-part.sum() for part in parts]).cpu().numpy().astype(np.float32)


def answer_logps(
    model: Any,
    rows: Sequence[Example],
    pad_id: int,
    ranks: DistributedContext = SINGLE_PROCESS,
    together: bool = False,
    note: Callable[[str], None] = silent,
) -> NDArray[np.float32]:
    """Log-probabilities of both sequences of each example under the present model, [N, 2].

    Args:
        together: the ranks pass through the model together, so each computes all.
        note: prints a line of progress now and then.

    Raises:
        WorkError: a value is not finite; names the row.
    """
    blocks, last = [], time.monotonic()
    for begin, block in _blocks(rows):
        sequences = [sequence for row in block for sequence in row.sequences]
        if together or ranks.world_size == 1:
            logps = sequence_logps(model, sequences, pad_id)
        else:
            logps = np.zeros(len(sequences), np.float32)
            own = sequence_logps(model, sequences[ranks.rank :: ranks.world_size], pad_id)
            for rank, values in enumerate(ranks.all_gather_object(own)):
                logps[rank :: ranks.world_size] = values
        for index in np.flatnonzero(~np.isfinite(logps)):
            raise WorkError(
                f"{sequences[index].origin}: the log-probability of an answer is {logps[index]}",
                hint="check the model with `lorakit chat`, or leave the row out",
            )
        blocks.append(logps.reshape(-1, 2))
        if time.monotonic() - last > SECONDS_BETWEEN_NOTES:
            last = time.monotonic()
            note(f"         {begin + len(block):,} of {len(rows):,}")
    return np.concatenate([np.zeros((0, 2), np.float32), *blocks])


def _blocks(rows: Sequence[Example]) -> Iterator[tuple[int, list[Example]]]:
    for begin in range(0, len(rows), BLOCK):
        yield begin, [rows[i] for i in range(begin, min(begin + BLOCK, len(rows)))]


class ReferenceStore:
    """Reference values of a run in a safetensors file, with a hash of what they belong to.

    Args:
        facts: everything beside the examples that the values depend on.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.facts = path, json.dumps(facts, sort_keys=True)

    def key(self, rows: Sequence[Example]) -> str:
        """Hash of the ids and masks of all sequences, and of `facts`."""
        digest = hashlib.sha256(self.facts.encode())
        for _, block in _blocks(rows):
            for row in block:
                digest.update(f"{len(row.input_ids)} {row.second} ".encode())
                digest.update(np.asarray(row.input_ids, np.int32).tobytes())
                digest.update((np.asarray(row.labels, np.int32) != IGNORE).tobytes())
        return digest.hexdigest()

    def read(self, part: str, key: str) -> NDArray[np.float32] | None:
        """The values [N, 2] of a part; None if they are missing, damaged or of other data."""
        try:
            with safe_open(self.path, "numpy") as file:
                keys = json.loads((file.metadata() or {}).get("keys", "{}"))
                if keys.get(part) != key:
                    return None
                values: NDArray[np.float32] = file.get_tensor(part)
        except (OSError, SafetensorError, ValueError):
            return None
        return values if np.isfinite(values).all() else None

    def write(self, values: Mapping[str, NDArray[np.float32]], keys: Mapping[str, str]) -> None:
        """Write the values of all parts at once."""
        tensors = {part: torch.from_numpy(each) for part, each in values.items()}
        # One entry: several would be written in random order.
        write_bytes(self.path, save(tensors, {"keys": json.dumps(keys, sort_keys=True)}))
