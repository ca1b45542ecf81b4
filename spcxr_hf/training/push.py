"""Push the checkpoints of a training run to the Hub in the background.

    pusher = HubPusher("me/my-model")          # before training: a bad id or a missing login is an error here
    pusher.push(checkpoint, "step 500")        # at each save; returns at once
    pusher.close(wait=120)                     # at the end: pushes the newest, or prints the command that does

A push is the client's `hf upload` in a separate process. `HfApi.upload_folder(run_as_future=True)` would be a thread,
and the client has no time limit on its requests: the interpreter joins such a thread at exit, so that a Hub that
accepts a connection and never answers would keep the training from ending. A process can be killed.

One push runs at a time. A save during a push is skipped, as transformers' `Trainer` does; the next save, or the end of
the run, pushes the newest. A commit on the Hub is atomic, so users see the whole push or the one before.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from spcxr_hf.errors import SpcxrError, one_line
from spcxr_hf.hub.publish import without_token

logger = logging.getLogger(__name__)

# Needed only to resume a run: two to three times the size of the weights.
LEFT_OUT = ("optimizer.safetensors", "average.safetensors", "training_state.json", "checksums.json")
SNAPSHOT = ".push"  # in the run's folder
# Environment of the client: its token, and no progress bars.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_VERBOSITY": "error"}


class HubPusher:
    """Pushes the newest of the folders that it is given. No method raises because of the Hub or the disk.

    Args:
        repo_id: The repository; created by the first push if it does not exist.
        private: Create a private repository; None: the default of the namespace.
        token: By default the one of `hf auth login` or `HF_TOKEN`. The client gets it in its environment.
        timeout: Seconds after which a push is killed and counts as failed.
        retry_after: Seconds after a failure in which saves are not pushed.

    Raises:
        SpcxrError: the id is not valid, or there is no token.
    """

    def __init__(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        timeout: float = 900.0,
        retry_after: float = 30.0,
    ):
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise SpcxrError(f"{repo_id}: not the id of a Hub repository ({one_line(str(error))})") from error
        self._token = token or get_token()
        if self._token is None:
            raise SpcxrError(f"{repo_id}: no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")
        self.repo_id, self._private, self._timeout, self._retry_after = repo_id, private, timeout, retry_after
        self.pushed: str | None = None
        self._newest: tuple[Path, str] | None = None
        self._process: subprocess.Popen | None = None
        self._pushing, self._deadline, self._not_before, self._warned = "", 0.0, 0.0, False
        atexit.register(self._kill)

    def push(self, folder: str | os.PathLike, name: str) -> None:
        """Start to push `folder`, unless an earlier push is still running or has just failed.

        Args:
            folder: A checkpoint, which may be deleted afterwards; the optimiser's state in it is left out.
            name: For the commit's message: "step 500".
        """
        self._newest = (Path(folder), name)
        self._collect()
        if self._process is None and time.monotonic() >= self._not_before:
            self._start()

    def close(self, wait: float = 120.0) -> bool:
        """Push the newest state, trying for at most `wait` seconds.

        Returns:
            Whether it is on the Hub. If not, the command that pushes it later is printed.
        """
        deadline = time.monotonic() + wait
        self._retry_after = min(self._retry_after, 2.0)  # no save follows that would try again
        self._collect()
        self._not_before = min(self._not_before, time.monotonic() + self._retry_after)
        while (left := self._newest is not None and self._newest[1] != self.pushed) and time.monotonic() < deadline:
            if self._process is None and time.monotonic() >= self._not_before:
                self._start()
            time.sleep(0.05)
            self._collect()
        self._kill()
        atexit.unregister(self._kill)
        if self._newest is not None:
            folder, name = self._newest
            shutil.rmtree(folder.parent / SNAPSHOT, ignore_errors=True)
            if left:
                last = f"the last pushed is {self.pushed}" if self.pushed else "nothing has been pushed"
                excluded = "".join(f" --exclude {file}" for file in LEFT_OUT if (folder / file).exists())
                print(
                    f"{name} was not pushed to {self.repo_id} ({last}); push it later with\n"
                    f"    hf upload {self.repo_id} {folder} .{excluded}",
                    flush=True,
                )
        return not left

    def _start(self) -> None:
        """Start `hf upload` of the newest state; afterwards `_collect` sees how it ended."""
        assert self._newest is not None
        folder, self._pushing = self._newest
        self._deadline = time.monotonic() + self._timeout
        try:
            snapshot = take_snapshot(folder)
            command = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", self.repo_id, str(snapshot), "."]
            command += ["--commit-message", f"Training: {self._pushing}"]
            command += [] if self._private is None else ["--private" if self._private else "--no-private"]
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **QUIET, "HF_TOKEN": self._token or ""},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            self._fail(f"{folder}: {error.strerror or error}")

    def _collect(self) -> None:
        """See whether the push that runs has ended, or kill it when its time is over."""
        if self._process is None:
            return
        is_late = self._process.poll() is None and time.monotonic() >= self._deadline
        if is_late:
            self._kill()
        elif self._process.poll() is None:
            return
        said = self._process.communicate()[1].decode(errors="replace")
        if is_late:
            self._fail(f"not finished after {self._timeout:.0f} s")
        elif self._process.returncode == 0:
            if self._warned:
                logger.warning("pushing to %s works again: %s is there", self.repo_id, self._pushing)
            self.pushed, self._not_before, self._warned = self._pushing, 0.0, False
        else:
            lines = [line for line in said.splitlines() if line.strip() and "warning" not in line.lower()]
            self._fail(without_token(one_line(" ".join(lines[-4:])) or "`hf upload` failed", self._token))
        self._process = None

    def _fail(self, cause: str) -> None:
        self._not_before = time.monotonic() + self._retry_after
        if not self._warned:  # once, until a push works again
            self._warned = True
            logger.warning("not pushed to %s: %s. Training continues; the next save is pushed", self.repo_id, cause)

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def take_snapshot(folder: Path) -> Path:
    """A hidden folder beside a checkpoint with hard links to its files, or copies where the disk has no links.

    The checkpoint may be deleted while the snapshot is pushed. Checkpoints are never changed in place.

    Raises:
        OSError: a file is gone, or the disk is full.
    """

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    snapshot = folder.parent / SNAPSHOT
    shutil.rmtree(snapshot, ignore_errors=True)
    shutil.copytree(folder, snapshot, copy_function=link, ignore=shutil.ignore_patterns(*LEFT_OUT))
    return snapshot
