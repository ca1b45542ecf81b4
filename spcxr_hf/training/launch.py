"""Scripts of `training_scripts/` under the launcher of accelerate, and recipes by their names."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import installed_recipe, recipe_folder, worker_count

# How a recipe's comment names the command that takes it, and its name there. Others are of benchmarks.
COMMAND = re.compile(r"Command: (?:[A-Z_]+=\S+ )*spcxr ([\w-]+) (\w+)")


class Recipe(NamedTuple):
    """A recipe of the package: the command that takes it, its name there, its file, and what it is for."""

    command: str
    name: str
    path: Path
    title: str


def list_recipes() -> list[Recipe]:
    """The recipes of the package that a command of `spcxr` takes, by command and name."""
    found = []
    for path in recipe_folder().glob("*.yaml"):
        comment = " ".join(re.findall(r"^# (.*)", path.read_text(encoding="utf-8"), re.MULTILINE))
        if match := COMMAND.search(comment):
            found.append(Recipe(match[1], match[2], path, re.split(r"(?<=\w)[.;] ", comment)[0]))
    return sorted(found)


def find_recipe(name: str, script: str) -> Path:
    """The file of a recipe: a path, or the name of one of the package's, with or without the name of its script."""
    for one in (name, f"{name}.yaml", f"{script}_{name}.yaml"):
        if (path := installed_recipe(one)).is_file():
            return path
    if Path(name).name == name and not name.endswith((".yaml", ".yml")):
        raise SpcxrError(f"{name}: cannot be read (no such file or recipe; `spcxr recipes` lists the names)")
    return Path(name)


def launch_command(
    script: str, words: Sequence[str], processes: int | None = None, config_file: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """The words that start a script, one process by `python` and several by `accelerate launch`, and its variables.

    Args:
        script: The script's name.
        words: The script's own arguments.
        processes: How many processes; by default 1, or as the file says.
        config_file: A launch file of accelerate, or the name of one of `recipes/accelerate/`.
    """
    count = processes or 1
    variables = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, worker_count() // count))}
    module = ["-m", f"spcxr_hf.training_scripts.{script}", *words]
    if count == 1 and config_file is None:
        return ["python", *module], variables
    flags = ["--quiet"]  # no traceback of the launcher's below the script's own message; for several, see `main`
    if config_file is not None:
        found = installed_recipe(config_file, "accelerate"), installed_recipe(f"{config_file}.yaml", "accelerate")
        flags += ["--config_file", str(next((path for path in found if path.is_file()), config_file))]
        flags += [] if processes is None else ["--num_processes", str(processes)]
    else:
        flags += ["--num_processes", str(count), "--num_machines", "1", "--mixed_precision", "no"]
        flags += ["--dynamo_backend", "no", *(["--multi_gpu"] if count > 1 else [])]
    if count > 1 and "ACCELERATE_USE_CPU" not in os.environ:
        import torch

        variables |= {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    return ["accelerate", "launch", *flags, *module], variables


def launch(script: str, words: Sequence[str], processes: int | None = None, config_file: str | None = None) -> None:
    """Print the command of `launch_command` and become it; with `--help` the script alone."""
    command, variables = launch_command(script, words, processes, config_file)
    start = command[1:] if command[0] == "python" else ["-m", __name__, *command[2:]]
    if "--help" in words:
        print("--processes N and --config-file FILE are for accelerate's launcher; all else is the script's:")
        start = command[command.index("-m") :]
    else:
        print(
            " ".join([*(f"{name}={value}" for name, value in variables.items()), shlex.join(command)]), file=sys.stderr
        )
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *start], {**os.environ, **variables})


def main() -> None:
    """`accelerate launch`, without the traceback that it adds below what a process that failed has said."""
    from accelerate.commands.launch import main as accelerate_launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the script too, which is waited for
    try:
        accelerate_launch()
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        raise SystemExit(status if status > 0 else 128 - status) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


if __name__ == "__main__":
    main()
