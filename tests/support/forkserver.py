"""Runs commands of editcli in children of a process that has imported everything, so that each costs no start-up.

Reads jobs as JSON lines on standard input. ``{"start": [arguments], "folder", "log", "prelude"}`` forks a child that
runs ``prelude`` and then the command, and answers with its process id; ``{"wait": id}`` answers with its exit code,
which is minus the signal for a child that was killed. This process computes nothing, so that forking it is safe.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import torch
import transformers

import editcli.api
import editcli.render.run
import editcli.runs.undo  # noqa: F401 - imported once for all children.
from editcli.__main__ import main


def start(job: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(job["folder"])
        for number, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{job['log']}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        exec(job["prelude"], {"__name__": "prelude"})
        code = main(job["start"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    torch.set_num_threads(1)
    # The classes of the tiny model are imported when they are first asked for.
    transformers.LlamaForCausalLM, transformers.GPT2LMHeadModel  # noqa: B018
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            answer = os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1])
        else:
            answer = start(job)
        print(answer, flush=True)


if __name__ == "__main__":
    serve()
