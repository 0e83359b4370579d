"""Runs on disks that are too small, by 32 sizes: never torn, the missing bytes said, then resumed.

    python benchmarks/disk_full.py --out benchmarks/results/disk_full.json

Each disk is a tmpfs in a mount namespace of its own (`unshare -Urm`, no rights needed). A run meets
it three ways: as it is (lorakit asks for the space before step 1), filled by somebody else after
that question, and with a limit on the size of files. Then there is room again, and the resumed
run's end must equal the unbroken one's to the byte. tests/test_crash.py runs a share.
"""

import argparse
import collections
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import crash

SPEC = {**crash.spec_of(0), "save_every": 2, "keep_checkpoints": 2}
ROOM = 2**28


def mount(place, size):
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "disk", place], check=True)


def remount(place, options):
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def unasked():
    """The space was there when it was asked for; others took it since."""
    from lorakit import pipeline

    pipeline.require_space = lambda *_: None


def limit_files(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Campaign:
    """Small disks, and what came of them."""

    def __init__(self, place):
        self.runs = crash.Campaign(place, 0)
        self.disk, crash.ASIDE = place / "disk", place
        whole = place / "whole"
        code = crash.end_of(crash.start(self.runs.world, whole, SPEC, self.runs.phase))
        if code:
            raise SystemExit(f"the run fails with room: {self.runs.fault(whole)}")
        self.wanted = crash.result_of(whole)
        self.ends, self.said, self.failures = collections.Counter(), {}, []
        used = sum(p.stat().st_blocks * 512 for p in whole.rglob("*"))
        one = sum(
            p.stat().st_blocks * 512 for p in next((whole / "checkpoints").iterdir()).iterdir()
        )
        # Three checkpoints lie there while the oldest of them goes.
        self.needs = used + one + 2**16

    def trial(self, way, size, prepare=None):
        """One disk of `size` bytes (or files of at most `size`), a run, room, the same run."""
        folder = self.disk / f"{way}-{size}"
        mount(self.disk, ROOM if way == "file limit" else max(4096, size))
        try:
            self.until_full(way, size, folder, prepare)
            remount(self.disk, f"size={ROOM}")
            code = crash.end_of(crash.start(self.runs.world, folder, SPEC, self.runs.phase))
            if code or crash.result_of(folder) != self.wanted:
                said = self.runs.fault(folder) if code else "another end"
                self.failures.append(f"{way} {size}: with room: exit {code}: {said}")
        finally:
            subprocess.run(["umount", self.disk], check=True)
            shutil.rmtree(crash.cache_of(folder), ignore_errors=True)
            crash.fault_of(folder).unlink(missing_ok=True)

    def until_full(self, way, size, folder, prepare):
        process = crash.start(self.runs.world, folder, SPEC, self.runs.phase, prepare=prepare)
        code, said = crash.end_of(process), self.runs.fault(folder)
        at_work = str(self.runs.phase)
        if code not in (0, 1):
            self.failures.append(f"{way} {size}: exit {code}: {said}")
        if found := crash.torn(folder):
            self.failures.append(f"{way} {size}: torn: {found}")
        leftover = [p.name for p in folder.rglob(".*") if ".tmp-" in p.name or ".old-" in p.name]
        if leftover:
            self.failures.append(f"{way} {size}: left {leftover}")
        if code == 1:
            # The cache of prepared data lies elsewhere and says its own.
            if "missing" not in said and "free)" not in said and ".cache" not in said:
                self.failures.append(f"{way} {size}: does not count: {said}")
            self.said.setdefault(f"{way}, {at_work}", said.replace(str(self.disk), "DISK"))
        taken = max((int(p.name[5:]) for p in (folder / "checkpoints").glob("step_*")), default=0)
        before = "before step 1" if at_work == "starting" else at_work
        end = "finished" if code == 0 else f"stopped, {before}, {taken} of 12 steps kept"
        self.ends[f"{way}: {end}"] += 1

    def read_only(self):
        folder = self.disk / "run"
        mount(self.disk, ROOM)
        remount(self.disk, "ro")
        code = crash.end_of(crash.start(self.runs.world, folder, SPEC, self.runs.phase))
        said = self.runs.fault(folder).replace(str(self.disk), "DISK")
        self.said["read-only"] = said
        if code != 1 or "read-only" not in said.lower():
            self.failures.append(f"read-only: exit {code}: {said}")
        subprocess.run(["umount", self.disk], check=True)


def run_all(place, steps):
    campaign = Campaign(place)
    for number in range(steps):
        size = campaign.needs * number // max(1, steps - 1)
        # More is asked for than these small files take: 1 MiB is reserved beside the tensors.
        campaign.trial("asked", 10 * size)
        campaign.trial("filled since", size, unasked)
    largest = max(p.stat().st_size for p in (place / "whole").rglob("*"))
    for number in range(max(2, steps // 4)):
        limit = 4096 + largest * number // max(1, steps // 4 - 1)
        campaign.trial("file limit", limit, lambda limit=limit: limit_files(limit))
    campaign.read_only()
    return campaign


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if os.environ.get("IN_NAMESPACE") != "1":
        os.environ["IN_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "-Urm", sys.executable, *sys.argv])
    crash.import_everything()
    from lorakit.bench import commit

    began, code = time.monotonic(), commit()
    with tempfile.TemporaryDirectory() as folder:
        campaign = run_all(Path(folder), args.steps)
    result = {
        "command": " ".join(["python", "benchmarks/disk_full.py", *sys.argv[1:]]),
        "disks": campaign.ends.total(),
        "sizes": args.steps,
        "largest_bytes": campaign.needs,
        "failures": campaign.failures,
        "ends": dict(sorted(campaign.ends.items())),
        "messages": campaign.said,
        "seconds": round(time.monotonic() - began, 1),
    }
    crash.finish(result, args.out, code)
    sys.exit(bool(campaign.failures))


if __name__ == "__main__":
    main()
