"""Small shares of the campaigns in benchmarks/, one after the other in one process.

    python campaign_shares.py '{"crash": [flags], "corruption": [flags], "disk_full": []}' FOLDER

The libraries are imported once, and every run is a forked child. Each campaign writes its result
to FOLDER/<name>.json, or the reason why it ended early to FOLDER/<name>.txt. `disk_full` needs a
mount namespace of its own (`unshare -Urm`).
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from tests.in_process import quick_ends

import corruption
import crash
import disk_full

CAMPAIGNS = {"crash": crash.main, "corruption": corruption.main}


def small_disks(out):
    """One disk of each kind; `benchmarks/disk_full.py` has 32 sizes of them."""
    with tempfile.TemporaryDirectory() as folder:
        campaign = disk_full.Campaign(Path(folder))
        half = campaign.needs // 2
        largest = max(p.stat().st_size for p in (Path(folder) / "whole").rglob("*"))
        campaign.trial("asked", half)
        campaign.trial("filled since", half, disk_full.unasked)
        campaign.trial("file limit", half, lambda: disk_full.limit_files(largest // 2))
        campaign.read_only()
    ends, messages = sorted(campaign.ends), campaign.said
    crash.finish({"failures": campaign.failures, "ends": ends, "messages": messages}, out, "")


def main(asked, folder):
    crash.import_everything()
    quick_ends()
    for name, flags in asked.items():
        out = folder / f"{name}.json"
        try:
            if name == "disk_full":
                small_disks(out)
            else:
                sys.argv = [name, *flags, "--out", str(out)]
                CAMPAIGNS[name]()
        except SystemExit as stop:
            (folder / f"{name}.txt").write_text(str(stop))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
