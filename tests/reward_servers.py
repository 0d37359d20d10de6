"""Reward servers on this machine, as good and as bad as a test says."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def lengths(request):
    """The scores of a server that is in order."""
    return {"scores": [float(len(text)) for text in request["completions"]]}


class Served:
    """What a server was asked: `requests`, with the path and the headers of each; `url`; the most at one time."""

    def __init__(self):
        self.requests, self.paths, self.headers, self.url = [], [], [], ""
        self.lock, self.running, self.most = threading.Lock(), 0, 0


@contextmanager
def server(*answers, otherwise=lengths):
    """Serve `answers` one request after the other, then `otherwise`. Each is called with the request, or also with the
    handler if it writes its answer itself; a status alone answers with it.
    """
    served, script = Served(), list(answers)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with served.lock:
                served.requests.append(request)
                served.paths.append(self.path)
                served.headers.append(dict(self.headers))
                served.running, self.is_counted = served.running + 1, True
                served.most = max(served.most, served.running)
                answer = script.pop(0) if script else otherwise
            try:
                self.reply(answer, request)
            except OSError:
                pass  # the client has gone
            finally:
                self.leave()
            self.close_connection = True

        def leave(self):
            with served.lock:
                served.running -= self.is_counted
                self.is_counted = False

        def reply(self, answer, request):
            if isinstance(answer, int):
                self.write(answer, b"<html>no</html>")
            elif isinstance(answer, bytes):
                self.write(200, answer)
            elif getattr(answer, "writes", False):
                answer(self)
            else:
                self.write(200, json.dumps(answer(request)).encode())

        def write(self, status, content, **headers):
            self.leave()  # before the client has its answer, and asks again
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128

    http = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{http.server_address[1]}"
    try:
        yield served
    finally:
        http.shutdown()
        http.server_close()


def writes(function):
    """Mark an answer that writes to the connection itself."""
    function.writes = True
    return function


def stalls(seconds):
    """An answer that comes late."""

    def answer(request):
        time.sleep(seconds)
        return lengths(request)

    return answer


@writes
def hangs_up(handler):
    handler.connection.close()


@writes
def promises_more(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [')


@writes
def drips(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


@writes
def redirects(handler):
    handler.write(307, b"", Location="http://127.0.0.1:9/elsewhere?token=hunter2hunter2")


def busy(retry_after):
    """An answer that asks to come back later."""

    @writes
    def answer(handler):
        handler.write(429, b"slow down", Retry_After=retry_after)

    return answer
