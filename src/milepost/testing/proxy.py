"""A loopback proxy for an HTTP server that injects network faults: cuts, delays, lost answers, 503.

::

    with Proxy(store.port) as proxy:
        proxy.fault = lambda request: Fault("drop_answer") if request.number == 3 else None
        ... use proxy.endpoint ...
        proxy.requests  # all requests, in order
"""

from __future__ import annotations

import http.client
import http.server
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

FaultKind = Literal["refuse", "cut", "status", "delay", "drop_answer", "truncate", "twice", "hook"]
TIMEOUT_S = 120.0

_OWN_HEADERS = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length", "expect"})


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """A received request. ``number`` counts from 0 over the proxy's lifetime; ``path`` excludes the query."""

    number: int
    method: str
    path: str
    query: str
    nbytes: int

    def __str__(self) -> str:
        return f"{self.number} {self.method} {self.path}{'?' + self.query if self.query else ''} {self.nbytes}"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault injected into a request.

    ``refuse``       the connection is reset before the request reaches the server
    ``cut``          the connection is reset in the middle of the answer's head; the request does not reach the server
    ``status``       the proxy answers ``status`` itself
    ``delay``        the request waits ``seconds``, then continues as usual
    ``drop_answer``  the server acts, its answer is lost
    ``truncate``     the server acts, the second half of its answer's body is lost
    ``twice``        the server acts twice, its second answer is returned
    ``hook``         ``hook`` is called, then the request continues as usual
    """

    kind: FaultKind
    status: int = 503
    seconds: float = 0.0
    hook: Callable[[], None] | None = None


_NONE = Fault("delay")


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


class Proxy:
    """Serves from construction to :meth:`close`. ``fault`` is called for each request, from several threads."""

    def __init__(self, port: int, *, fault: Callable[[HttpRequest], Fault | None] = lambda request: None):
        self.fault = fault
        self.requests: list[HttpRequest] = []
        self.num_faults = 0
        self._port = port
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def count(self) -> Counter[str]:
        """Requests by method since the last :meth:`forget`."""
        with self._lock:
            return Counter(request.method for request in self.requests)

    def forget(self) -> None:
        """Reset the counts."""
        with self._lock:
            self.requests.clear()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def note(self, method: str, target: str, nbytes: int) -> Fault | None:
        """Record a request; returns the fault to inject."""
        path, _, query = target.partition("?")
        with self._lock:
            request = HttpRequest(len(self.requests), method, path, query, nbytes)
            self.requests.append(request)
        fault = self.fault(request)
        if fault is not None:
            with self._lock:
                self.num_faults += 1
        return fault

    def forward(self, method: str, target: str, headers: list[tuple[str, str]], body: bytes) -> _Answer:
        """Forward a request to the server, over a new connection each: requests share nothing but the store."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_S)
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            for name, value in headers:
                connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            found = connection.getresponse()
            return _Answer(found.status, found.reason, found.getheaders(), found.read())
        finally:
            connection.close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: Proxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: disconnected clients are expected here."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.proxy.note(self.command, self.path, len(body)) or _NONE
        if fault.kind in ("refuse", "cut"):
            self._reset(reset=fault.kind == "refuse")
        elif fault.kind == "status":
            self._answer(_Answer(fault.status, "Injected", [], b""))
        else:
            time.sleep(fault.seconds)
            if fault.hook is not None:
                fault.hook()
            self._forward(fault.kind, body)

    def _forward(self, kind: FaultKind, body: bytes) -> None:
        headers = [(name, value) for name, value in self.headers.items() if name.lower() not in _OWN_HEADERS]
        try:
            for _ in range(2 if kind == "twice" else 1):
                answer = self.server.proxy.forward(self.command, self.path, headers, body)
        except (OSError, http.client.HTTPException):  # the server is down
            self._reset(reset=True)
            return
        if kind == "drop_answer":
            self._reset(reset=False)
        else:
            self._answer(answer, truncated=kind == "truncate")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _answer(self, answer: _Answer, *, truncated: bool = False) -> None:
        self.send_response_only(answer.status, answer.reason)
        length = str(len(answer.body))
        for name, value in answer.headers:
            if name.lower() == "content-length":
                length = value  # a HEAD's length is that of a GET's body
            elif name.lower() not in _OWN_HEADERS:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if truncated else answer.body)
        if truncated:
            self._reset(reset=False)

    def _reset(self, *, reset: bool) -> None:
        """Close the connection; with ``reset`` like a machine that has died."""
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()
