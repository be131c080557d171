"""An app for the tests with one path per thing that a gateway or a sleep could break. Standard library alone.

It keeps its state in memory on purpose: what is still there after a sleep came out of the snapshot.
"""
import hashlib
import json
import os
import select
import sys
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

import websocket
from server import Server

STARTED = time.time()
# Made once before the snapshot: every clone of the image shows the same one, a restarted process would show another.
BORN = uuid.uuid4().hex
BLOCK = bytes(range(256)) * 256  # 64 KiB

served = 0
notes = {}
# How often each request to /hasty came.
hasty = {}
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Those of the request's body, once it is read.
    trailers = ()
    # A connection that its client forgot does not hold a thread for ever.
    timeout = 600

    def log_message(self, format, *args):
        # With all that reached the guest, so that a token that should not have is found in the app's log.
        print(f"{self.command} {self.path} {args[1] if len(args) > 1 else ''} {dict(getattr(self, 'headers', None) or {})}", flush=True)

    # -- answers ------------------------------------------------------------------------------------------------

    def answer(self, body, status=200, kind="application/json", headers=()):
        bodyless = status in (204, 304)
        data = b"" if bodyless else body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        if not bodyless:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def begin_chunked(self, kind, headers=()):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def end_chunked(self, trailers=()):
        self.wfile.write(b"0\r\n" + b"".join(b"%s: %s\r\n" % pair for pair in trailers) + b"\r\n")
        self.wfile.flush()

    def body(self):
        """The request's body, piece by piece, whichever way it is framed."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.trailers = []
            while line := self.rfile.readline().strip():
                self.trailers.append(line.decode("latin-1"))
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left:
                piece = self.rfile.read(min(left, 65536))
                if not piece:
                    raise ConnectionError("the client went away in the middle of a body")
                left -= len(piece)
                yield piece

    # -- paths --------------------------------------------------------------------------------------------------

    def do_GET(self):
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        name = "path_" + (url.path.strip("/").replace("/", "_") or "count")
        handler = getattr(self, name, None)
        if handler is None:
            self.answer({"no such path": url.path}, status=404)
        else:
            handler()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_OPTIONS = do_GET

    def path_count(self):
        global served
        with lock:
            served += 1
            number = served
        self.answer({"requests_served": number, "uptime_seconds": round(time.time() - STARTED, 2), "pid": os.getpid(), "born": BORN})

    def path_headers(self):
        self.answer({"method": self.command, "path": self.path, "version": self.request_version, "headers": self.headers.items()})

    def path_time(self):
        clock = lambda which: time.clock_gettime(which)
        self.answer({"realtime": clock(time.CLOCK_REALTIME), "monotonic": clock(time.CLOCK_MONOTONIC), "boottime": clock(time.CLOCK_BOOTTIME)})

    def path_random(self):
        self.answer({"urandom": os.urandom(32).hex()})

    def path_status(self):
        self.answer({}, status=int(self.query["code"]), headers=[("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"), ("Location", "/elsewhere")])

    def path_slow(self):
        time.sleep(float(self.query.get("seconds", 1)))
        self.path_count()

    def path_note(self):
        """PUT keeps a text, GET shows it: memory that a sleep must not lose."""
        if self.command == "PUT":
            notes[self.query["name"]] = b"".join(self.body()).decode()
        self.answer({"note": notes.get(self.query["name"])})

    def path_upload(self):
        digest, size = hashlib.sha256(), 0
        for piece in self.body():
            digest.update(piece)
            size += len(piece)
        self.answer({"sha256": digest.hexdigest(), "bytes": size, "expect": self.headers.get("Expect"), "trailers": self.trailers})

    def path_hasty(self):
        """Answers, and closes the connection if no other request comes in ?after=S seconds; without ?id what came so far."""
        if "id" not in self.query:
            return self.answer(hasty)
        size = sum(len(piece) for piece in self.body())
        with lock:
            hasty[self.query["id"]] = hasty.get(self.query["id"], 0) + 1
        self.answer({"bytes": size})
        if not select.select([self.connection], [], [], float(self.query["after"]))[0]:
            # At once: what is left of the handler has no connection any more.
            os.close(self.connection.detach())
            self.close_connection = True

    def path_big(self):
        left = int(self.query.get("bytes", 1 << 20))
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(left))
        self.end_headers()
        while left:
            piece = BLOCK[:left]
            self.wfile.write(piece)
            left -= len(piece)

    def path_chunked(self):
        self.begin_chunked("text/plain", headers=[("Trailer", "X-Digest")])
        digest = hashlib.sha256()
        for number in range(int(self.query.get("count", 5))):
            piece = b"piece %d\n" % number
            digest.update(piece)
            self.chunk(piece)
        self.end_chunked([(b"X-Digest", digest.hexdigest().encode())])

    def path_hints(self):
        """An interim answer before the real one."""
        self.wfile.write(b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n")
        self.wfile.flush()
        self.path_count()

    def path_sse(self):
        """Ticks: ?count=N ends after N (default: never), ?every=S between two."""
        self.begin_chunked("text/event-stream")
        number, last = 0, int(self.query.get("count", 0))
        try:
            while not last or number < last:
                number += 1
                data = json.dumps({"tick": number, "realtime": time.time(), "pid": os.getpid()})
                self.chunk(f"id: {number}\nevent: tick\ndata: {data}\n\n".encode())
                if number != last:
                    time.sleep(float(self.query.get("every", 0.2)))
            self.end_chunked()
        except OSError:
            self.close_connection = True  # The client has seen enough.

    def path_ws(self):
        """A WebSocket echo; ?pick=P selects P if it was offered, ?hello=1 first sends what was offered."""
        if self.headers.get("Upgrade", "").lower() != "websocket" or not self.headers.get("Sec-WebSocket-Key"):
            self.answer({"error": "this path speaks WebSocket"}, status=426, headers=[("Upgrade", "websocket")])
            return
        offered = self.headers.get("Sec-WebSocket-Protocol")
        pick = self.query.get("pick")
        picked = pick and pick in [name.strip() for name in (offered or "").split(",")]
        websocket.accept(self, headers=[("Sec-WebSocket-Protocol", pick)] if picked else [])
        if self.query.get("hello"):
            websocket.write_frame(self.wfile, websocket.TEXT, json.dumps({"offered": offered}).encode())
        try:
            websocket.echo(self.rfile, self.wfile)
        except OSError:
            pass  # The client left without a close frame.

    def path_say(self):
        """?text= is said as a line, ?bytes=N as many bytes in lines of a hundred."""
        if "text" in self.query:
            print(self.query["text"], flush=True)
        line = "x" * 99 + "\n"
        for _ in range(int(self.query.get("bytes", 0)) // (len(line) * 100)):
            sys.stdout.write(line * 100)
        sys.stdout.flush()
        self.answer({})

    def path_exit(self):
        self.answer({"exiting": self.query.get("code", "0")})
        self.wfile.flush()
        # After the answer is on its way: a process that ends at once may take the last bytes with it.
        threading.Timer(0.2, os._exit, [int(self.query.get("code", "0"))]).start()


def main(address="0.0.0.0", port=8080, second_port=9000):
    # The second listener is on loopback only: a gateway must reach that as well, and a token for 8080 must not open it.
    second = Server(("127.0.0.1", second_port), Handler)
    threading.Thread(target=second.serve_forever, daemon=True).start()
    Server((address, port), Handler).serve_forever()


if __name__ == "__main__":
    main()
