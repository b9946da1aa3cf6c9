"""A server that answers as a test tells it to, for what no honest Tesseract does."""

import contextlib
import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SCALAR = {"shape": {"maxItems": 0, "type": "array"}, "dtype": {"examples": ["float64"]}}
ANY = {"shape": {"items": {"type": "integer"}, "type": "array"}, "dtype": {"examples": ["float64"]}}


def array_field(shape=ANY, flags=("DIFFERENTIABLE",)):
    return {"type": "object", "properties": shape, "array_flags": list(flags)}


SCHEMA = {
    "info": {"title": "fake"},
    "paths": {f"/{name}": {} for name in ("apply", "abstract_eval", "vector_jacobian_product")},
    "components": {
        "schemas": {
            "Apply_InputSchema": {"type": "object", "properties": {"x": array_field()}},
            "Apply_OutputSchema": {"type": "object", "properties": {"y": array_field()}},
        }
    },
}
GOOD = {
    "object_type": "array",
    "shape": [2],
    "dtype": "float64",
    "data": {"buffer": "AAAAAAAA8D8AAAAAAAAAQA==", "encoding": "base64"},
}


class Fake:
    """What the server answers, and what it was asked.

    Attributes:
        answers: By path, what comes back: an object (as JSON), bytes, or a function of the handler.
        status: The status of the next answers.
        asked: The path and the headers of each request.
        trickled: How many bytes `trickle` has sent.
    """

    def __init__(self, url):
        self.url = url
        self.status = 200
        self.asked = []
        self.trickled = 0
        self.schema = SCHEMA
        self.answers = {"/abstract_eval": {"y": {"shape": [2], "dtype": "float64"}}, "/apply": {"y": GOOD}}

    def posts(self):
        return [path for path, _ in self.asked if path != "/openapi.json"]


@contextlib.contextmanager
def fake_tesseract(certificate=None):
    """A server with that certificate and key, if any."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None
    server.fake = Fake(f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}")
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(self.server.fake.schema if self.path.endswith("/openapi.json") else {"status": "ok"}, 200)

    def do_POST(self):
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.server.fake.answers[self.path]
        if callable(answer):
            answer(self)
        else:
            self.reply(answer, self.server.fake.status)

    def reply(self, answer, status):
        self.server.fake.asked.append((self.path, dict(self.headers)))
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Say nothing."""


def hang_up(handler):
    """End the connection without an answer, as a worker does that dies."""
    handler.server.fake.asked.append((handler.path, {}))
    handler.close_connection = True


def half_an_answer(handler):
    """Promise more bytes than come."""
    handler.server.fake.asked.append((handler.path, {}))
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"y": ')
    handler.close_connection = True


def trickle(handler):
    """One byte now and then: never late for a single read, and never done."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(100):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            handler.server.fake.trickled += 1
            time.sleep(0.05)
