"""A sweep that is killed again and again, and resumed: a child of this process for each life.

    python killed_sweep.py '{"folder", "settings", "vary", "halving", "kills": [7, 30]}'

Each child is killed before the flush to the disk of that number, the last one lives. Prints how
each of them ended.
"""

import gc
import itertools
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.in_process import import_libraries, quick_ends

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork


def die_at_flush(number):
    count, plain = itertools.count(), os.fsync

    def fsync(handle):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(handle)

    os.fsync = fsync


def life(job, kill):
    from rich.console import Console

    import lorakit
    from lorakit.data import cache

    folder = Path(job["folder"])
    cache.cache_home = lambda: folder.parent / "cache"
    if kill is not None:
        die_at_flush(kill)
    console = Console(quiet=True)
    if (folder / "sweep.json").exists():
        lorakit.sweep(str(folder), resume=True, console=console)
    else:
        given = {"vary": job["vary"], "halving": job["halving"], "output_dir": str(folder)}
        lorakit.sweep(**given, console=console, **job["settings"])


def main(job):
    import_libraries()
    import lorakit.sweeps.run_sweep  # noqa: F401

    quick_ends()

    ends = []
    for kill in [*job["kills"], None]:
        child = os.fork()
        if not child:
            code = 99
            try:
                gc.freeze()
                life(job, kill)
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
