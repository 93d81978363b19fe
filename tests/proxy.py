"""A proxy on loopback that passes HTTP on to a server and causes the faults that networks and stores have."""

import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TRANSIENT = ("500", "503", "slow", "reset", "sever", "cut", "lost")
CHANCE = "bucket-[0-9a-f]+|-[0-9a-f]{12}(?=[.]parquet)"  # the random parts of names of buckets and attempts
ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
    "skewed": (
        403,
        "RequestTimeTooSkewed",
        "The difference between the request time and the current time is too large.",
    ),
}


class Proxy:
    """A running proxy.

    Attributes:
        fault: a function of the method, the path without its random parts, and the range of bytes, that returns the
            fault of a request, or "" for none. "500", "503" and "skewed" are error answers of S3. "slow" waits for a
            second, "hang" until the proxy ends. "reset" breaks the connection at the beginning of the request, "sever"
            in the middle of its body, "cut" in the middle of the answer, and "lost" after the server has done the
            request and before the answer. "short" returns half of the body, with the matching Content-Length.
        done: number of requests with each fault.
        asked: method and path of every request.
    """

    def __init__(self, target: str):
        self.fault: Callable[[str, str, str], str] = lambda *request: ""
        self.done: Counter[str] = Counter()
        self.asked: list[tuple[str, str]] = []
        self.ended = threading.Event()
        host, port = target.removeprefix("http://").split(":")
        handler = type("To", (_Handler,), {"proxy": self, "target": (host, int(port))})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def proxied(target: str) -> Iterator[Proxy]:
    proxy = Proxy(target)
    threading.Thread(target=proxy.server.serve_forever, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.ended.set()
        proxy.server.shutdown()
        proxy.server.server_close()


def transient(seed: int, share: float = 0.3) -> Callable[[str, str, str], str]:
    """Return a `Proxy.fault` with transient faults: a share of the requests fails once, some twice, then they succeed.

    Which requests fail depends only on the seed and the request, not on their order.
    """
    tries: Counter[tuple[str, str, str]] = Counter()
    lock = threading.Lock()

    def fault(*request: str) -> str:
        with lock:
            tries[request] += 1
            attempt = tries[request]
        draw = random.Random(f"{seed} {request}")
        planned = [draw.choice(TRANSIENT) for _ in range(2) if draw.random() < share]
        return planned[attempt - 1] if attempt <= len(planned) else ""

    return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy
    target: tuple[str, int]

    def handle_one(self) -> None:
        path = self.path.partition("?")[0]
        fault = self.proxy.fault(self.command, re.sub(CHANCE, "", self.path), self.headers.get("Range", ""))
        self.proxy.asked.append((self.command, path))
        self.proxy.done[fault] += 1
        length = int(self.headers.get("Content-Length", 0))
        if fault in ("reset", "sever", "hang"):
            self.rfile.read(length // 2 if fault == "sever" else 0)
            if fault == "hang":
                self.proxy.ended.wait()
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if fault in ERRORS:
            self._refuse(*ERRORS[fault])
            return
        if fault == "slow":
            self.proxy.ended.wait(1)
        connection = HTTPConnection(*self.target)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "lost":
            self.close_connection = True
            return
        if fault == "short":
            data = data[: len(data) // 2]
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(name, value)
        size = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if fault == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)

    def _refuse(self, status: int, code: str, message: str) -> None:
        data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = do_PATCH = handle_one

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):  # the client has closed the connection
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        return
