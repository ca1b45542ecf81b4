"""The demo in a browser, by Gradio: `spcxr demo --serve`, and the Space.

serve -> running -> build_page    the page; `session` computes the answers, `templates/` holds the HTML

By default it listens on this machine alone. It contacts no other host and keeps no file: an upload is kept in a
temporary folder until it is read, which is at once; answers stay in memory.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from base64 import b64encode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader
from PIL import Image

from spcxr_hf.app.session import (
    MAX_BYTES,
    MAX_FILES,
    Radiograph,
    Session,
    list_choices,
    load_index,
    made_radiograph,
    read_example,
)
from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import RESEARCH_NOTICE
from spcxr_hf.models.typicality import UNLIKE

SECONDS_KEPT = 1800  # how long a visitor's radiographs stay in memory after the page is closed
MAX_VISITORS = 32
MAX_WAITING = 32
STALE_SECONDS = 300  # after which Gradio deletes an upload that was not read
HOST, PORT = "127.0.0.1", 7860
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
JPEG_QUALITY = 88


def jpeg_address(picture: Image.Image) -> str:
    """The picture as a `data:` address."""
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"


def csv_address(vector: torch.Tensor) -> str:
    """The numbers of a vector, one a line, as a `data:` address."""
    lines = "\n".join(repr(value) for value in vector.tolist())
    return f"data:text/csv;base64,{b64encode(lines.encode()).decode()}"


TEMPLATES = Environment(loader=PackageLoader("spcxr_hf.app"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
TEMPLATES.globals["UNLIKE"] = UNLIKE
TEMPLATES.filters.update(jpeg=jpeg_address, csv=csv_address)
HTML: Any = TEMPLATES.get_template("fragments.html").module


# ---- the server --------------------------------------------------------------------------------------------------


def serve(
    checkpoints: Path | None = None,
    models: Sequence[str] = (),
    index: Path | None = None,
    host: str | None = HOST,
    port: int | None = PORT,
    device: str = "auto",
) -> None:
    """Show the demo until it is interrupted or terminated; its temporary folder is removed then.

    Args:
        checkpoints: A folder that holds a folder per checkpoint; by default the source tree's own.
        models: Hub ids instead of folders, as in the Space.
        index: An index of neighbors (`neighbors.build_index`), the file or its folder.
        host: Where to listen; None: the value of GRADIO_SERVER_NAME, else this machine alone.
        port: None: a free one.
        device: As of `load_model`.

    Raises:
        SpcxrError: Gradio is missing, there is no checkpoint, the index cannot be used, or the port is taken.
    """
    session = Session(list_choices(checkpoints, models), None if index is None else load_index(index), device)
    with running(session, host, port) as address:
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):  # in place of what they do, so that what follows still runs
            with suppress(ValueError):  # in another thread than the first there are no signals
                signal.signal(number, lambda *_: ended.set())
        print(f"The demo is at {address} (Ctrl-C ends it). Research use only.", file=sys.stderr, flush=True)
        while not ended.wait(1.0):
            pass


@contextmanager
def running(session: Session, host: str | None = HOST, port: int | None = None) -> Iterator[str]:
    """The demo's address, while it is being served.

    On a loopback address, a request whose Host header names another host is refused: otherwise a web page could read
    the demo's answers through a name that resolves to this machine (DNS rebinding).
    """
    named = host or os.environ.get("GRADIO_SERVER_NAME") or HOST
    hosts = [*LOOPBACK] if named in LOOPBACK else ["*"]
    before = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")}
    with tempfile.TemporaryDirectory(prefix="spcxr-demo-") as folder:
        os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")
        try:
            with _launched(build_page(session), host, port, hosts) as address:
                yield address
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextmanager
def _launched(page: Any, host: str | None, port: int | None, allowed_hosts: list[str]) -> Iterator[str]:
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    theme = _import_gradio().themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    style, head = (TEMPLATES.get_template(name).render(max_bytes=MAX_BYTES) for name in ("style.css", "head.html"))
    try:
        try:
            _, address, _ = page.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
                ssr_mode=False, show_error=False, footer_links=[], enable_monitoring=False, mcp_server=False,
                max_file_size=MAX_BYTES, state_session_capacity=MAX_VISITORS, theme=theme, css=style, head=head,
                app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)]},
            )  # fmt: skip
        except OSError as error:
            raise SpcxrError(f"port {port} cannot be listened on: give another --port") from error
        yield address
    finally:
        page.close(verbose=False)


def _import_gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise SpcxrError('the demo in a browser needs Gradio: pip install "spcxr-hf[app]"') from error
    return gradio


# ---- the page ----------------------------------------------------------------------------------------------------


def build_page(session: Session) -> Any:
    """The page, as `gradio.Blocks`; it opens with an example and its answer."""
    gradio = _import_gradio()
    choices = [(f"{choice.title} ({choice.population})" if choice.population else choice.title, name)
               for name, choice in session.choices.items()]  # fmt: skip
    with gradio.Blocks(
        title="SPCXR demo", analytics_enabled=False, delete_cache=(STALE_SECONDS, STALE_SECONDS)
    ) as page:
        radiographs = gradio.State([], time_to_live=SECONDS_KEPT)
        gradio.HTML(HTML.note(RESEARCH_NOTICE.capitalize()), elem_id="spcxr-note")
        gradio.HTML(HTML.title(MAX_FILES, MAX_BYTES), elem_id="spcxr-title")
        with gradio.Row(elem_id="spcxr-columns"):
            with gradio.Column(scale=2, min_width=300):
                upload = gradio.File(
                    label="Radiographs: PNG, JPEG, DICOM", file_count="multiple", elem_id="spcxr-upload", height=190
                )
                listed = gradio.HTML(HTML.radiographs([]), elem_id="spcxr-files")
                with gradio.Row():
                    example = gradio.Button("Public radiograph", size="sm", elem_id="spcxr-example")
                    made = gradio.Button("Drawn radiograph", size="sm", elem_id="spcxr-made")
                task = gradio.Radio(choices, value=choices[0][1], label="Task", elem_id="spcxr-task")
                in_spite = gradio.Checkbox(False, label="Answer all the same where the answer is not to be relied on")
                ask = gradio.Button("Ask", variant="primary", elem_id="spcxr-ask")
                forget = gradio.Button("Forget these radiographs", size="sm", elem_id="spcxr-forget")
            with gradio.Column(scale=5, min_width=320):
                shown = gradio.HTML(HTML.answers([]), elem_id="spcxr-answers")
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        changed = [upload, radiographs, listed, shown]

        def read(files: Any) -> tuple:
            paths = [Path(file["path"]) for file in files or []]
            return show(session.read(paths), max(0, len(paths) - MAX_FILES))

        def show(found: list[Radiograph], left_out: int = 0) -> tuple:
            """An empty place for the next upload, the radiographs, their list, and no answers."""
            return None, found, HTML.radiographs(found, left_out), HTML.answers([])

        @cache
        def open_page() -> tuple:
            found = read_example()
            found = made_radiograph() if found.image is None else found
            return None, [found], HTML.radiographs([found]), answer(session, [found], choices[0][1], False)

        # Paths, not Gradio's own reading, which would leave a file behind; it has checked that they lie in its folder.
        upload.upload(read, upload, changed, preprocess=False, **private)
        example.click(lambda: show([read_example()]), None, changed, **private)
        made.click(lambda: show([made_radiograph()]), None, changed, **private)
        forget.click(lambda: show([]), None, changed, **private)
        ask.click(lambda *given: answer(session, *given), [radiographs, task, in_spite], shown, **private)
        page.load(open_page, None, changed, **private)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=2, api_open=False)
    return page


def answer(session: Session, radiographs: Sequence[Radiograph] | None, name: str, in_spite: bool) -> str:
    """The HTML of the chosen task's answers.

    Args:
        session: Computes them.
        radiographs: A section for each.
        name: The choice.
        in_spite: Answer also where there are reasons not to rely on the answer.
    """
    if not radiographs:
        return HTML.message("There is no radiograph yet: drop a file, or take one of the two examples.")
    sections = []
    for one in radiographs:
        section: dict[str, Any] = {"radiograph": one, "cause": one.cause, "reasons": session.reasons(one, name)}
        if one.image is not None and (in_spite or not section["reasons"]):
            try:
                section["answer"] = session.answer(one, name)
            except SpcxrError as error:
                section["cause"] = str(error)
        sections.append(section)
    return HTML.answers(sections)
