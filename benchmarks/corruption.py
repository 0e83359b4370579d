"""Checkpoints damaged in a thousand ways: is each one noticed, and the newest whole one taken?

    python benchmarks/corruption.py --out benchmarks/results/corruption.json

A real run's three checkpoints are copied, one to three of them are damaged, and the newest whole
one is asked for. Every fortieth time a real resume follows, whose end must equal the unbroken
run's to the byte. tests/test_crash.py runs a share.
"""

import argparse
import collections
import os
import pickle
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import crash


class Canary:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def a_file(rng, folder):
    return rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))


def flip_bit(rng, folder, _others, _canary):
    path = a_file(rng, folder)
    raw = bytearray(path.read_bytes())
    raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)


def truncate(rng, folder, _others, _canary):
    path = a_file(rng, folder)
    size = path.stat().st_size
    os.truncate(path, rng.choice([0, 1, size // 2, size - 1, rng.randrange(size)]))


def grow(rng, folder, _others, _canary):
    with a_file(rng, folder).open("ab") as handle:
        handle.write(rng.randbytes(rng.randrange(1, 100)))


def zeros(rng, folder, _others, _canary):
    """What a power cut leaves of a file whose bytes were never flushed."""
    path = a_file(rng, folder)
    path.write_bytes(bytes(path.stat().st_size))


def delete(rng, folder, _others, _canary):
    a_file(rng, folder).unlink()


def swap_file(rng, folder, others, _canary):
    """One file of another checkpoint; sometimes its manifest as well."""
    other = rng.choice(others)
    names = [p.name for p in folder.iterdir() if p.read_bytes() != (other / p.name).read_bytes()]
    for name in rng.sample(names, rng.randrange(1, len(names))):
        shutil.copy(other / name, folder / name)


def swap_whole(rng, folder, others, _canary):
    """All of another checkpoint under this one's name: each byte is right, the step is not."""
    shutil.rmtree(folder)
    shutil.copytree(rng.choice(others), folder)


def plant_pickle(rng, folder, _others, canary):
    name = rng.choice(["optimizer.pt", "rng_state.pth", "scheduler.pt", "pytorch_model.bin"])
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))


def pickle_instead(rng, folder, _others, canary):
    a_file(rng, folder).write_bytes(pickle.dumps(Canary(canary)))


def link_out(rng, folder, others, _canary):
    """A link to the same bytes elsewhere: they could change after they were checked."""
    path, outside = a_file(rng, folder), folder.parent.parent / f"outside-{rng.random()}"
    path.rename(outside)
    path.symlink_to(outside)


KINDS = (
    flip_bit,
    truncate,
    grow,
    zeros,
    delete,
    swap_file,
    swap_whole,
    plant_pickle,
    pickle_instead,
    link_out,
)
SPEC = {**crash.spec_of(0), "save_every": 4, "keep_checkpoints": 3}


def damage_some(rng, run, canary):
    """Damage one to three checkpoints, newest first; returns {step: kind} of those damaged."""
    folders = run.list_checkpoints()
    whole = {p: p.with_name(f"pristine-{p.name}") for p in folders}
    for folder, copy in whole.items():
        shutil.copytree(folder, copy)
    count = rng.choices([1, 2, 3], [6, 3, 1])[0]
    done = {}
    for folder in folders[::-1][:count]:
        kind = rng.choices(KINDS, [4, 2, 1, 1, 2, 2, 1, 1, 1, 1])[0]
        kind(rng, folder, [whole[p] for p in folders if p != folder], canary)
        done[int(folder.name[5:])] = kind.__name__
    for copy in whole.values():
        shutil.rmtree(copy)
    return done


class Campaign:
    """Damages, and what came of them."""

    def __init__(self, place, seed):
        self.runs = crash.Campaign(place, seed)
        self.rng, self.place = random.Random(seed), place
        self.whole = place / "whole"
        code = crash.end_of(crash.start(self.runs.world, self.whole, SPEC, self.runs.phase))
        if code:
            raise SystemExit(f"the run fails undamaged: {self.runs.fault(self.whole)}")
        self.wanted = crash.result_of(self.whole)
        self.kinds, self.failures = collections.Counter(), []
        self.resumed = self.refused = 0

    def trial(self, number, resume):
        from lorakit.storage.run_dir import RunDir
        from lorakit.train.checkpoint import newest_intact

        folder, canary = self.place / f"trial-{number}", self.place / f"canary-{number}"
        shutil.copytree(self.whole, folder)
        shutil.copytree(crash.cache_of(self.whole), crash.cache_of(folder))
        run = RunDir(folder)
        steps = [int(p.name[5:]) for p in run.list_checkpoints()]
        damaged = damage_some(self.rng, run, canary)
        self.kinds.update(damaged.values())
        left = max((s for s in steps if s not in damaged), default=None)
        found, notes = newest_intact(run)
        if (found.step if found else None) != left:
            self.failures.append(f"{number}: {damaged}: took {found}, not step {left}")
        elif len(notes) != len(damaged):
            self.failures.append(f"{number}: {damaged}: said only {notes}")
        elif resume or left is None:
            self.resume(number, folder, left, damaged)
        if canary.exists():
            self.failures.append(f"{number}: {damaged}: a pickle was loaded")
        self.runs.forget(folder)
        for path in self.place.glob("outside-*"):
            path.unlink()

    def resume(self, number, folder, left, damaged):
        shutil.rmtree(folder / "adapter")
        code = crash.end_of(crash.start(self.runs.world, folder, SPEC, self.runs.phase))
        if left is None:
            self.refused += 1
            if code != 2 or "no complete checkpoint" not in self.runs.fault(folder):
                self.failures.append(f"{number}: {damaged}: all damaged, exit {code}")
            return
        self.resumed += 1
        if code or crash.result_of(folder) != self.wanted:
            said = self.runs.fault(folder) if code else "another end"
            self.failures.append(f"{number}: {damaged}: exit {code}: {said}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corruptions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    crash.import_everything()
    from lorakit.bench import commit

    began, code = time.monotonic(), commit()
    with tempfile.TemporaryDirectory() as folder:
        campaign, number = Campaign(Path(folder), args.seed), 0
        while campaign.kinds.total() < args.corruptions:
            campaign.trial(number, resume=number % 40 == 0)
            number += 1
    result = {
        "command": " ".join(["python", "benchmarks/corruption.py", *sys.argv[1:]]),
        "corruptions": campaign.kinds.total(),
        "trials": number,
        "failures": campaign.failures,
        "kinds": dict(sorted(campaign.kinds.items())),
        "resumed_bit_identical": campaign.resumed,
        "refused_with_none_left": campaign.refused,
        "seconds": round(time.monotonic() - began, 1),
    }
    crash.finish(result, args.out, code)


if __name__ == "__main__":
    main()
