"""Training runs in processes of their own, which can be killed.

They are forked from a server that has imported what they need and done nothing else. Forked from the tests' own process
they could have no backward pass where autograd has started threads there: torch 2.15 does so if a model is exported
before the first one.
"""

import functools
import multiprocessing
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tqdm import tqdm

from spcxr_hf.modeling.configuration_spcxr import SIZES
from tests.made_up import SMALL_PRESET

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["training_scripts.pretrain", "training_scripts.finetune_classification", "pyarrow.dataset", "matplotlib.figure"]
)


def with_small_models(main: Callable[[list[str]], object]) -> Callable[[list[str]], object]:
    """`main` where the preset "tiny" is `SMALL_PRESET`, for `start` and `start_group`."""
    return functools.partial(_with_small_models, main)


def _with_small_models(main: Callable[[list[str]], object], words: list[str]) -> None:
    SIZES["tiny"] = SMALL_PRESET
    main(words)


def start(main: Callable[[list[str]], object], words: Sequence[str], log: Path, **environment: str) -> BaseProcess:
    """Start `main(words)`, a function of a module, in a process; what it prints goes to the file `log`."""
    told = {**os.environ, "ACCELERATE_USE_CPU": "true", **environment}
    process = SERVER.Process(target=_run, args=(main, list(words), log, told))
    process.start()
    return process


def start_group(
    main: Callable[[list[str]], object], words: Sequence[str], log: Path, count: int = 2
) -> list[BaseProcess]:
    """Start `count` processes that know of each other, as a launcher would; all print to files beginning with `log`."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        start(main, words, log.with_suffix(f".{rank}"), RANK=str(rank), LOCAL_RANK=str(rank), **common)
        for rank in range(count)
    ]


def finish(processes: Sequence[BaseProcess], timeout: float = 300) -> list[int | None]:
    """Wait for all; their exit codes."""
    for process in processes:
        process.join(timeout)
    return [process.exitcode for process in processes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _own_progress_lock() -> None:
    """Progress bars of forked processes share a lock: one that is killed while it holds it stops all the others."""
    lock, classes = threading.RLock(), [tqdm]
    while classes:
        bar = classes.pop()
        bar.set_lock(lock)
        classes += bar.__subclasses__()


def _run(main: Callable[[list[str]], object], words: list[str], log: Path, environment: dict[str, str]) -> None:
    with log.open("ab", buffering=0) as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    os.environ.clear()  # the server's, as it was when that was started
    os.environ.update(environment)
    _own_progress_lock()
    multiprocessing.set_start_method(None, force=True)  # the platform's own, as a run has it that nobody tests
    torch.set_num_threads(1)
    try:
        main(words)
    except SystemExit as leave:
        os._exit(leave.code if isinstance(leave.code, int) else 1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
