"""The guest of the wake contract: it executes what it is sent and keeps a ledger of it.

Every request names itself with `id`, and the ledger says how often each id came, what became of it and which of the node's
request ids it carried. The ledger lives in memory, so that what it shows has been through every sleep. At the end the
driver compares it with its own. HTTP/1.1, WebSocket and server-sent events on 8080, gRPC on 50051.
"""
import hashlib
import json
import queue
import socket
import struct
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

import grpc

import websocket
from server import Server

BLOCK = bytes(range(256)) * 4096  # 1 MiB
lock = threading.Lock()
# id -> what is known of it.
ledger = {}
# id of an event stream -> the queue that its thread waits on.
listeners = {}


def begin(name, kind, node_id):
    """One more execution of that request."""
    with lock:
        entry = ledger.setdefault(name, {"kind": kind, "begun": 0, "done": 0, "node_ids": []})
        entry["begun"] += 1
        entry["node_ids"].append(node_id)
        return entry


def publish(event):
    """Gives an event to every event stream of this guest."""
    with lock:
        waiting = list(listeners.values())
    for one in waiting:
        one.put(event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # The header and the body of an answer are two writes; without this the second waits for the first to be acknowledged.
    disable_nagle_algorithm = True
    timeout = 3600
    # How long a connection may wait for its next request.
    keepalive = 3600

    def handle_one_request(self):
        self.connection.settimeout(self.keepalive)
        super().handle_one_request()

    def parse_request(self):
        self.connection.settimeout(self.timeout)
        return super().parse_request()

    def log_message(self, format, *args):
        pass

    def answer(self, data, kind="application/json", status=200, headers=()):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def pieces(self):
        """The request's body; raises if it ends before its end."""
        def exactly(size):
            data = self.rfile.read(size)
            if len(data) != size:
                raise ConnectionError("the body was cut")
            return data

        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while True:
                line = self.rfile.readline()
                if not line.endswith(b"\r\n"):
                    raise ConnectionError("the body was cut")
                size = int(line.split(b";")[0], 16)
                data = exactly(size + 2)[:-2]
                if not size:
                    return
                yield data
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left:
                data = exactly(min(left, 65536))
                left -= len(data)
                yield data

    def do_GET(self):
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        name = url.path.strip("/")
        if name == "ledger":
            with lock:
                data = json.dumps(ledger).encode()
            return self.answer(data)
        self.name = self.query["id"]
        self.entry = begin(self.name, name, self.headers.get("x-amzn-requestid"))
        try:
            getattr(self, "path_" + name)()
        except OSError as error:
            # The client left, or its body was cut.
            self.entry["error"] = repr(error)
            self.close_connection = True

    do_POST = do_PUT = do_DELETE = do_GET

    def path_get(self):
        size = int(self.query["bytes"])
        start = int(self.query["start"])
        data = (BLOCK[start:] + BLOCK * (size // len(BLOCK)) + BLOCK[:start])[:size]
        self.answer(data, "application/octet-stream", headers=[("x-executions", str(self.entry["begun"]))])
        self.entry["done"] += 1
        publish(self.name)

    def path_post(self):
        digest, size = hashlib.sha256(), 0
        for piece in self.pieces():
            digest.update(piece)
            size += len(piece)
        self.entry |= {"bytes": size, "sha256": digest.hexdigest()}
        self.entry["done"] += 1
        self.answer(json.dumps({"id": self.name, "bytes": size, "sha256": digest.hexdigest(), "executions": self.entry["begun"]}).encode())

    def path_drop(self):
        """Takes the whole request and ends the connection without a byte: in order, or by a reset."""
        for _ in self.pieces():
            pass
        self.entry["done"] += 1
        if self.query.get("how") == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def path_cut(self):
        """Promises more than it sends."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(BLOCK[:50_000])
        self.entry["done"] += 1
        self.close_connection = True

    def path_sse(self):
        """An event for every GET that is executed here meanwhile and, with `every`, one after that many seconds of silence;
        each has the next number. /end?of=<id> ends it with an event that says how many there were."""
        mine = listeners[self.name] = queue.SimpleQueue()
        every = float(self.query["every"]) if "every" in self.query else None
        try:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            number, cause = 0, "hello"
            while cause is not None:
                number += 1
                self.entry["events"] = number
                self.chunk(b"id: %d\ndata: %s\n\n" % (number, cause.encode()))
                try:
                    cause = mine.get(timeout=every)
                except queue.Empty:
                    cause = "tick"
            self.chunk(b"id: %d\nevent: end\ndata: end\n\n" % (number + 1))
            self.wfile.write(b"0\r\n\r\n")
            self.entry["done"] += 1
        finally:
            del listeners[self.name]

    def path_settings(self):
        Handler.keepalive = float(self.query["keepalive"])
        self.answer(b"{}")

    def path_end(self):
        with lock:
            stream = listeners.get(self.query["of"])
        if stream is not None:
            stream.put(None)
        self.entry["done"] += 1
        self.answer(b"{}")

    def path_ws(self):
        """Echoes every message with its number in front."""
        websocket.accept(self)
        digest, number = hashlib.sha256(), 0
        while True:
            final, opcode, payload = websocket.read_frame(self.rfile)
            if opcode == websocket.PING:
                websocket.write_frame(self.wfile, websocket.PONG, payload)
            elif opcode == websocket.CLOSE:
                websocket.write_frame(self.wfile, websocket.CLOSE, payload)
                self.entry["done"] += 1
                return
            elif opcode == websocket.BINARY and final:
                number += 1
                digest.update(payload)
                self.entry |= {"messages": number, "sha256": digest.hexdigest()}
                websocket.write_frame(self.wfile, websocket.BINARY, b"%d:" % number + payload)


def names(context):
    metadata = dict(context.invocation_metadata())
    return metadata["x-id"], metadata.get("x-amzn-requestid")


def unary(request, context):
    name, node_id = names(context)
    entry = begin(name, "grpc", node_id)
    entry["done"] += 1
    return b"%d:" % entry["begun"] + request


def chat(requests, context):
    """Echoes every message with its number in front."""
    name, node_id = names(context)
    entry = begin(name, "chat", node_id)
    digest = hashlib.sha256()
    for number, request in enumerate(requests, 1):
        digest.update(request)
        entry |= {"messages": number, "sha256": digest.hexdigest()}
        yield b"%d:" % number + request
    entry["done"] += 1


def main():
    calls = grpc.server(futures.ThreadPoolExecutor(max_workers=64))
    methods = {"Unary": grpc.unary_unary_rpc_method_handler(unary), "Chat": grpc.stream_stream_rpc_method_handler(chat)}
    calls.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("dormouse.Contract", methods),))
    if not calls.add_insecure_port("0.0.0.0:50051"):
        raise SystemExit("cannot listen on port 50051")
    calls.start()
    # Last: the image is ready when this port listens.
    Server(("0.0.0.0", 8080), Handler).serve_forever()


if __name__ == "__main__":
    main()
