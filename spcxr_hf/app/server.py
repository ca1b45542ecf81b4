"""The demo in a browser, by Gradio: `spcxr demo --serve`, and the Space.

serve -> build_app    the page; app_answers computes, app_html writes

It listens on this machine alone unless told otherwise, asks no other host for anything, and keeps no file: an upload
lies in a temporary folder until it is read, which is at once; answers never do.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spcxr_hf.app import html
from spcxr_hf.app.session import (
    MOST_BYTES,
    MOST_FILES,
    Desk,
    Page,
    example_page,
    list_choices,
    load_index,
    made_radiograph,
)
from spcxr_hf.errors import SpcxrError

SECONDS_KEPT = 1800  # of a session that is gone; its pages are in memory
MOST_SESSIONS = 32
MOST_WAITING = 32
STALE_SECONDS = 300  # an upload that nobody has asked about
HOST, PORT = "127.0.0.1", 7860
LAYOUT = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; padding-top: 3.25rem !important; }
#spcxr-note { position: fixed; top: 0; left: 0; right: 0; z-index: 50; padding: 0; border-radius: 0; }
#spcxr-note .html-container, #spcxr-title .html-container, #spcxr-pages .html-container { padding: 0; }
#spcxr-desk > * { min-width: 0 !important; }
@media (max-width: 800px) {
  #spcxr-desk { flex-direction: column; }
  #spcxr-desk, #spcxr-desk > * { width: 100%; max-width: calc(100vw - 7rem); }
}
#spcxr-ask { background: #0b57a4; color: #fff; }
#spcxr-upload .or { color: inherit; }
:focus-visible, .upload-container:focus-visible { outline: 3px solid #0072b2 !important; outline-offset: 2px; }
"""
# A screen reader is to say what a person reads on the place for files; Gradio's own label says other words. And of an
# upload that its server refuses, Gradio says "Error".
HEAD = """<script>
new MutationObserver(() => {
  for (const button of document.querySelectorAll("#spcxr-upload button.upload-container")) {
    const name = "Radiographs: " + button.innerText.replace(/\\s+/g, " ").trim();
    if (button.getAttribute("aria-label") !== name) button.setAttribute("aria-label", name);
  }
  for (const error of document.querySelectorAll("#spcxr-upload span.error")) {
    const text = "Not taken: larger than LIMIT MB, or the connection broke";
    if (error.textContent !== text) error.textContent = text;
    error.setAttribute("role", "alert");
  }
}).observe(document.documentElement, {childList: true, subtree: true});
</script>""".replace("LIMIT", str(MOST_BYTES // 2**20))


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
        index: An index of neighbours (`neighbours.build_index`), the file or its folder.
        host: Where to listen; None: what GRADIO_SERVER_NAME says, else this machine alone.
        port: None: a free one.
        device: As of `inference.load_model`.

    Raises:
        SpcxrError: Gradio is missing, there is no checkpoint, the index cannot be used, or the port is taken.
    """
    desk = Desk(list_choices(checkpoints, models), None if index is None else load_index(index), device)
    with running(desk, host, port) as address:
        ended = _asked_to_end()  # before anybody knows the address
        print(f"The demo is at {address} (Ctrl-C ends it). Research use only.", file=sys.stderr, flush=True)
        while not ended.wait(1.0):
            pass


@contextmanager
def running(desk: Desk, host: str | None = HOST, port: int | None = None) -> Iterator[str]:
    """The demo's address, while it is being served.

    Raises:
        SpcxrError: Gradio is missing, or the port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="spcxr-demo-") as folder, _environment(folder):
        gradio = _import_gradio()
        app, style = build_app(desk), html.STYLE + LAYOUT
        theme = gradio.themes.Default(
            primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        )
        try:
            _, address, _ = app.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
                ssr_mode=False, show_error=False, footer_links=[], enable_monitoring=False, mcp_server=False,
                max_file_size=MOST_BYTES, state_session_capacity=MOST_SESSIONS, theme=theme, css=style, head=HEAD,
            )  # fmt: skip
        except OSError as error:
            raise SpcxrError(f"port {port} cannot be listened on: give another --port") from error
        try:
            yield address
        finally:
            app.close(verbose=False)


def build_app(desk: Desk) -> Any:
    """The page, as `gradio.Blocks`.

    Raises:
        SpcxrError: Gradio is missing.
    """
    gradio = _import_gradio()
    with gradio.Blocks(
        title="SPCXR demo", analytics_enabled=False, delete_cache=(STALE_SECONDS, STALE_SECONDS)
    ) as page:
        pages = gradio.State([], time_to_live=SECONDS_KEPT)
        gradio.HTML(html.heading(), elem_id="spcxr-note")
        gradio.HTML(html.title(), elem_id="spcxr-title")
        with gradio.Row(elem_id="spcxr-desk"):
            with gradio.Column(scale=2, min_width=300):
                upload = gradio.File(
                    label="Radiographs: PNG, JPEG, DICOM",
                    file_count="multiple",
                    elem_id="spcxr-upload",
                    height=190,
                )
                listed = gradio.HTML(html.list_pages([]), elem_id="spcxr-pages")
                with gradio.Row():
                    example = gradio.Button("Public radiograph", size="sm", elem_id="spcxr-example")
                    made = gradio.Button("Drawn radiograph", size="sm", elem_id="spcxr-made")
                titles = list(desk.choices)
                task = gradio.Radio(titles, value=titles[0], label="Task", elem_id="spcxr-task")
                in_spite = gradio.Checkbox(
                    False, label="Answer all the same where it does not look like a chest radiograph"
                )
                ask = gradio.Button("Ask", variant="primary", elem_id="spcxr-ask")
                forget = gradio.Button("Forget these radiographs", size="sm", elem_id="spcxr-forget")
            with gradio.Column(scale=5, min_width=320):
                shown = gradio.HTML(html.answers([]), elem_id="spcxr-answers")
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        cleared = [upload, pages, listed, shown]
        # Paths, not Gradio's own reading, which would leave a file behind; that they lie in its folder it has checked.
        upload.upload(lambda files: _take(desk, files), upload, cleared, preprocess=False, **private)
        example.click(lambda: _put([example_page()]), None, cleared, **private)
        made.click(lambda: _put([made_radiograph()]), None, cleared, **private)
        forget.click(lambda: _put([]), None, cleared, **private)
        ask.click(lambda *given: _ask(desk, *given), [pages, task, in_spite], shown, **private)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=2, api_open=False)
    return page


# ---- what the page does ------------------------------------------------------------------------------------------


def _take(desk: Desk, files: Any) -> tuple[None, list[Page], str, str]:
    """Uploaded files -> an empty place for the next ones, the pages, and what is shown of them."""
    paths = [Path(file["path"]) for file in files or []]
    return _put(desk.take(paths), max(0, len(paths) - MOST_FILES))


def _put(pages: list[Page], left_out: int = 0) -> tuple[None, list[Page], str, str]:
    return None, pages, html.list_pages(pages, left_out), html.answers([])


def _ask(desk: Desk, pages: list[Page] | None, title: str, in_spite: bool) -> str:
    if not pages:
        return html.message("There is no radiograph yet: drop a file, or take one of the two examples.")
    return html.answers(_section(desk, page, title, in_spite) for page in pages)


def _section(desk: Desk, page: Page, title: str, in_spite: bool) -> str:
    if page.image is None:
        return html.broken(page)
    if page.quality_warnings and not in_spite:
        return html.withheld(page)
    try:
        return html.section(desk.answer(page, title))
    except SpcxrError as error:
        return html.broken(Page(page.name, cause=str(error)))


# ---- the server --------------------------------------------------------------------------------------------------


def _import_gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise SpcxrError('the demo in a browser needs Gradio: pip install "spcxr-hf[app]"') from error
    return gradio


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """Uploads go to `folder`, and Gradio reports to nobody; afterwards the environment is as it was."""
    wanted = {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _asked_to_end() -> threading.Event:
    """Set by Ctrl-C or SIGTERM, in place of what they do, so that what follows still runs."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(ValueError):  # in another thread than the first there are no signals
            signal.signal(number, lambda *_: ended.set())
    return ended
