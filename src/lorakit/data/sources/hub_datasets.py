"""Read the rows of a hub dataset, downloaded first or streamed if the disk is small."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.data.sources.locate import HubData
from lorakit.errors import DataError, first_line
from lorakit.types import Origin, Row


def read_hub(data: HubData, source: str, offline: bool) -> Iterator[Row]:
    """Read the rows of a hub dataset, numbered from 1.

    Raises:
        DataError: the dataset cannot be loaded, or has several splits and none was named.
    """
    import datasets
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if offline and not HF_HUB_OFFLINE:
        raise DataError(
            f"{source}: not a local file, and the hub is not used when offline",
            hint="set HF_HUB_OFFLINE=1 to use a copy in the cache",
        )
    try:
        stream = _too_large(datasets, data)
        loaded = datasets.load_dataset(data.repo, data.config, split=data.split, streaming=stream)
    # Failures of network, access, name and format have a dozen types; all mean "not available".
    except Exception as error:
        state = "and the hub is offline" if HF_HUB_OFFLINE else "and the hub did not give it"
        raise DataError(
            f"{source}: no such file or folder here, {state}: {first_line(error)}",
            hint="check the spelling (user/name, user/name:split, user/name:config:split), the "
            "network, and for gated data your token (hf auth login)",
        ) from error
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) != 1:
            raise DataError(
                f"{source}: several splits ({', '.join(loaded)}), expected one",
                hint=f"choose one, such as {data.repo}:{next(iter(loaded))}",
            )
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    for number, values in enumerate(loaded, 1):
        yield Row(dict(values), Origin(source, number))


def _too_large(datasets: Any, data: HubData) -> bool:
    """True if a dataset takes more than half of the free disk; False for a slice.

    A slice cannot be streamed: it needs the complete dataset.
    """
    if data.split and "[" in data.split:
        return False
    info = datasets.load_dataset_builder(data.repo, data.config).info
    needed = (info.download_size or 0) + (info.dataset_size or 0)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return bool(needed > shutil.disk_usage(existing).free / 2)
