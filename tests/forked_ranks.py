"""Ranks as torchrun starts them, forked from one process that has the imports behind it.

    python forked_ranks.py '{"jobs": [...]}'

A job is {"name", "words": of the command line, "ranks", "folder", "fails": a rank or null, "env":
further variables}. Into `folder` goes what each rank said (said_0.txt ...), its exit code, and the
rows that it computed at each step (rows_0.jsonl ...).  `fails` lets a rank run out of memory while
it loads the base.
"""

import gc
import json
import os
import sys
from pathlib import Path

from in_process import (  # this file runs as a script: its folder is on the path
    exit_code,
    import_libraries,
    quick_ends,
)
from rank_ports import free_port

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads does not survive a fork


def import_everything():
    """Nothing here may start a thread."""
    import_libraries()
    import torch.distributed  # noqa: F401

    import lorakit.cli.main
    import lorakit.pipeline  # noqa: F401

    quick_ends()


def keep_rows(path):
    """Write down which rows of the data each step gives to this rank."""
    from lorakit.train.trainer import LoraTrainer

    plain = LoraTrainer._ready

    def ready(trainer, rows):
        made = plain(trainer, rows)
        with path.open("a") as file:
            file.write(json.dumps([e.origin.row for e in made.own.examples]) + "\n")
        return made

    LoraTrainer._ready = ready


def out_of_memory(*_args, **_kwargs):
    import torch

    torch.empty(2**50, dtype=torch.uint8)


def rank(job, number, port):
    """In a child: its exit code leaves."""
    folder = Path(job["folder"])
    said = os.open(folder / f"said_{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if job["ranks"] > 1:
        count = str(job["ranks"])
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "GROUP_RANK": "0"}
        os.environ |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **job["env"]}
    keep_rows(folder / f"rows_{number}.jsonl")
    if job["fails"] == number:
        from lorakit import pipeline

        pipeline.load_base = out_of_memory
    from lorakit.cli.main import main

    sys.argv = ["lorakit", *job["words"]]
    return exit_code(main)


def run(job):
    """All ranks of a job to their end."""
    port, children = free_port(), []
    for number in range(job["ranks"]):
        child = os.fork()
        if not child:
            code = 99
            try:
                # Otherwise each collection visits the million objects of the parent's imports.
                gc.freeze()
                code = rank(job, number, port)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"codes": codes}


if __name__ == "__main__":
    import_everything()
    print(json.dumps({job["name"]: run(job) for job in json.loads(sys.argv[1])["jobs"]}))
