"""A small Hub over loopback HTTP: the protocol that the unmodified `huggingface_hub` client (1.x and 2.x) speaks.

    with HubServer() as hub:
        api = HfApi(endpoint=hub.url, token=hub.add_token("me", namespaces=("spcxr",)))

Everything is kept in memory. Large files come from the host name `localhost`, as those of a CDN come from another
host. `hub.faults` holds what goes wrong and at which requests; `hub.requests` what was asked.
"""

import socket
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

from tests.hub_protocol import Hub
from tests.hub_store import Answer


@dataclass
class Fault:
    """What goes wrong at the requests `first` .. `last` (from 1) whose "METHOD path" has `where` in it.

    kind: "cut" drops the connection before anything is done; "cut_upload" in the middle of what the client sends;
    "cut_answer" after it is done and before the client hears of it; "slow" waits `seconds` first; "status" answers
    `status` with `message`.
    """

    kind: str
    first: int = 1
    last: int | None = None
    where: str = ""
    status: int = 503
    message: str = "Service Unavailable"
    seconds: float = 0.0

    def strikes(self, number: int, line: str) -> bool:
        return self.first <= number and (self.last is None or number <= self.last) and self.where in line


class HubServer(Hub):
    """A `Hub` that listens on a free port of 127.0.0.1 while the `with` block runs.

    Attributes:
        url: What `HF_ENDPOINT` is set to.
        requests: "METHOD path" of every request, in order.
        uploaded: How many bytes clients have sent as bodies.
        faults: What goes wrong; numbers count from the last `forget_requests`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[str] = []
        self.uploaded = 0
        self.faults: list[Fault] = []

    def __enter__(self) -> "HubServer":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Connection,), {"hub": self}))
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def forget_requests(self) -> None:
        self.requests, self.uploaded = [], 0

    def note(self, line: str) -> Fault | None:
        """Write the request down, and say what goes wrong with it."""
        with self.lock:
            self.requests.append(line)
            return next((fault for fault in self.faults if fault.strikes(len(self.requests), line)), None)


class Connection(BaseHTTPRequestHandler):
    """One client's connection."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do(self) -> None:
        fault = self.hub.note(f"{self.command} {self.path}")
        kind = fault.kind if fault else ""
        if kind in ("cut", "cut_upload"):
            if kind == "cut_upload":
                self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            return self.drop()
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        body = self.body()
        self.hub.uploaded += len(body)
        if fault and kind == "status":
            return self.send(Answer.of({"error": fault.message}, fault.status, **{"X-Error-Message": fault.message}))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.hub.lock:
            answer = self.hub.answer(self.command, self.path, headers, body)
        return self.drop() if kind == "cut_answer" else self.send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass
