"""Pushes a training run's checkpoints to the Hub in the background, whatever the Hub is doing.

    pusher = BackgroundPusher("me/my-model")   # before training: an id or a login that cannot work is told at once
    pusher.push(folder, "step 500")            # at each save; returns after some milliseconds
    pusher.close(wait=120)                     # at the end: tries for so long, then says what was not pushed

Each push is a process of its own, the client's `hf upload`, started from a thread: the client waits without an end for
a Hub that accepts and never answers, a process can be ended; and hashing takes nothing from the training's interpreter.
One push runs at a time, and the newest state wins: what a push under way and a save after it leave between is not
pushed. After a failure the next try waits (30 s, doubled each time, at most half an hour), then takes the newest state.

A push works on a snapshot of hard links (copies where the disk has none), so that a checkpoint may be deleted
meanwhile.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from spcxr_hf.errors import SpcxrError, one_line
from spcxr_hf.hub.folder import file_names
from spcxr_hf.hub.publish import without_token

logger = logging.getLogger(__name__)

# What a run needs to go on, and nobody else: two to three times the size of the weights.
LEFT_OUT = ("optimizer.safetensors", "average.safetensors", "training_state.json", "checksums.json")
NOT_PUSHED = "not_pushed"
SNAPSHOT = ".push-"
# In these variables the client finds its token, and says less.
QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_VERBOSITY": "error"}


@dataclass(frozen=True)
class _State:
    """A snapshot to push: `folder` is ours and deleted afterwards, `parent` where it was saved."""

    folder: Path
    parent: Path
    words: str


class BackgroundPusher:
    """Pushes the newest of the folders that it is given; see the module's text.

    Args:
        repo_id: Where to; created at the first push if there is no such repository.
        private: Create a private repository; None: as the namespace's own setting says.
        token: By default the one of `hf auth login` or `HF_TOKEN`. It reaches the pushing process in its environment.
        timeout: Seconds that one push may take before it is ended and counted as failed.
        first_delay: Seconds from the first failure to the next try.

    Raises:
        SpcxrError: the id is none, or there is no token.
    """

    LONGEST_DELAY = 1800.0

    def __init__(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | None = None,
        timeout: float = 900.0,
        first_delay: float = 30.0,
    ):
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise SpcxrError(f"{repo_id}: no id of a Hub repository ({one_line(str(error))})") from error
        self._token = token or get_token()
        if self._token is None:
            raise SpcxrError(f"{repo_id}: no token for the Hub: log in with `hf auth login`, or set HF_TOKEN")
        self.repo_id, self._private, self._timeout, self._first_delay = repo_id, private, timeout, first_delay
        self.pushed: str | None = None  # the words of the last state that arrived
        self._waiting: _State | None = None
        self._cleaned: set[Path] = set()
        self._failures, self._not_before, self._warned = 0, 0.0, False
        self._closing, self._given_up = False, False
        self._process: subprocess.Popen | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="push to the Hub", daemon=True)
        self._thread.start()
        atexit.register(self._end_process)

    # ---- for the training ----------------------------------------------------------------------------------------

    def push(self, folder: str | os.PathLike, words: str) -> None:
        """Take a snapshot of `folder` and push it when its turn comes. Never raises on account of a disk or the Hub.

        Args:
            folder: A checkpoint; the optimiser's state in it is left out.
            words: What it is, for the commit's message: "step 500".
        """
        try:
            self._clean(Path(folder).parent)
            state = _State(take_snapshot(Path(folder)), Path(folder).parent, words)
        except OSError as error:
            self._warn(f"no snapshot of {folder} ({error.strerror or error})")
            return
        with self._changed:
            if self._closing:  # nobody would push it
                older: _State | None = state
            else:
                older, self._waiting = self._waiting, state
            self._changed.notify_all()
        self._forget(older)

    def _clean(self, parent: Path) -> None:
        """Remove the snapshots of a run that was killed here."""
        if parent not in self._cleaned:
            self._cleaned.add(parent)
            for old in parent.glob(f"{SNAPSHOT}*"):
                shutil.rmtree(old, ignore_errors=True)

    def close(self, wait: float = 120.0) -> bool:
        """Push the last state, for at most `wait` seconds, and end.

        Returns:
            Whether the last state is on the Hub. If not, it is kept beside the checkpoints in `not_pushed`, and the
            command that pushes it later is printed.
        """
        deadline = time.monotonic() + wait
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(max(0.0, wait))
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
        self._end_process()
        self._thread.join(max(5.0, deadline - time.monotonic()))
        atexit.unregister(self._end_process)
        left, self._waiting = self._waiting, None
        if left is not None:
            self._keep(left)
        return left is None

    def _keep(self, state: _State) -> None:
        kept = state.parent / NOT_PUSHED
        try:
            shutil.rmtree(kept, ignore_errors=True)
            state.folder.rename(kept)
        except OSError:
            kept = state.folder
        last = f"the last that arrived is {self.pushed}" if self.pushed else "nothing has arrived there"
        print(
            f"{state.words} was not pushed to {self.repo_id} ({last}). It is kept; push it later with\n"
            f"    hf upload {self.repo_id} {kept} .",
            flush=True,
        )

    # ---- in the thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (state := self._next()) is not None:
            failure = self._upload(state)
            with self._changed:
                if failure is None:
                    self._succeed(state)
                else:
                    self._fail(state)
                superseded = failure is None or self._waiting is not state
            if failure is not None:
                self._warn(failure)
            if superseded:
                self._forget(state)

    def _next(self) -> _State | None:
        """Wait for a state whose turn it is, and take it; None at the end."""
        with self._changed:
            while not self._given_up:
                delay = self._not_before - time.monotonic()
                if self._closing:  # no time to lose, and none to waste on a Hub that is down
                    delay = min(delay, 2.0) if self._failures else 0.0
                    self._not_before = min(self._not_before, time.monotonic() + max(delay, 0.0))
                if self._waiting is not None and delay <= 0:
                    state, self._waiting = self._waiting, None
                    return state
                if self._waiting is None and self._closing:
                    return None
                self._changed.wait(delay if self._waiting is not None else None)
            return None

    def _succeed(self, state: _State) -> None:
        if self._warned:
            logger.warning("pushing to %s works again: %s arrived", self.repo_id, state.words)
        self.pushed, self._failures, self._not_before, self._warned = state.words, 0, 0.0, False
        shutil.rmtree(state.parent / NOT_PUSHED, ignore_errors=True)  # what an earlier run left there is older

    def _fail(self, state: _State) -> None:
        delay = min(self._first_delay * 2**self._failures, self.LONGEST_DELAY)
        self._failures += 1
        self._not_before = time.monotonic() + delay
        if self._waiting is None:  # no newer one has come
            self._waiting = state

    def _upload(self, state: _State) -> str | None:
        """Push in a process of its own; what went wrong, or None."""
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", "upload", self.repo_id, str(state.folder), "."]
        command += ["--commit-message", f"Training: {state.words}"]
        command += [] if self._private is None else ["--private" if self._private else "--no-private"]
        environment = {**os.environ, **QUIET, "HF_TOKEN": self._token or ""}
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            return f"`hf upload` cannot be started ({error.strerror or error})"
        if self._given_up:  # while it was being started
            self._end_process()
        try:
            _, said = self._process.communicate(timeout=self._timeout)
        except subprocess.TimeoutExpired:
            self._end_process()
            self._process.communicate()
            return f"no end after {self._timeout:.0f} s"
        return None if self._process.returncode == 0 else self._last_words(said)

    def _last_words(self, said: str) -> str:
        lines = [line for line in said.splitlines() if line.strip() and "warning" not in line.lower()]
        return without_token(one_line(" ".join(lines[-4:])) or "`hf upload` failed", self._token)

    def _end_process(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()

    def _warn(self, cause: str) -> None:
        """Say it once, until a push works again: training logs are long enough."""
        if not self._warned and not self._given_up:
            self._warned = True
            logger.warning("not pushed to %s: %s. Training goes on; the newest state follows", self.repo_id, cause)

    def _forget(self, state: _State | None) -> None:
        if state is not None:
            shutil.rmtree(state.folder, ignore_errors=True)


def take_snapshot(folder: Path) -> Path:
    """A hidden folder beside `folder` with hard links to its files, or copies where the disk has no links.

    A link keeps what it leads to when the other name is deleted, or another file renamed to it. Checkpoints are
    written anew and renamed, never changed in place.

    Raises:
        OSError: a file is gone, or the disk is full.
    """
    snapshot = Path(tempfile.mkdtemp(prefix=SNAPSHOT, dir=folder.parent))
    try:
        for name in file_names(folder):
            if name in LEFT_OUT:
                continue
            target = snapshot / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(folder / name, target)
            except OSError:
                shutil.copyfile(folder / name, target)
    except OSError:
        shutil.rmtree(snapshot, ignore_errors=True)
        raise
    return snapshot
