#!/usr/bin/env python3
"""What an idle connection costs the node: python load-tests/idle.py [--connections N]

Starts a node of its own and holds N TLS connections open, first of HTTP/1.1, then of HTTP/2, each after one answered
request (a refusal: no microVM is needed). Prints what the node's memory (PSS, /proc/<pid>/smaps_rollup) grew by for each.
Exits with 1 if that is more than the promise.

Owns: the node it starts. Bounded: N connections, opened one after the other.
"""
import argparse
import os
import re
import socket
import ssl
import sys
import tempfile
import time
from pathlib import Path

import hpack

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("DORMOUSE_BIN", str(Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "dormouse"))

from harness.node import Node  # noqa: E402
from harness.waiting import eventually  # noqa: E402

PROMISE_KIB = 45
HOST = "nobody.microvm.localhost"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, HEADERS, ACK, END_STREAM_AND_HEADERS = 4, 1, 1, 5


def pss_kib(pid):
    return int(re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M).group(1))


def open_connections(node):
    return node.metrics().total("edge_connections")


def frame(kind, flags, stream, payload=b""):
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def exactly(tls, length):
    data = b""
    while len(data) < length:
        piece = tls.recv(length - len(data))
        if not piece:
            raise ConnectionError("the node closed the connection")
        data += piece
    return data


def ask_h1(tls):
    tls.sendall(f"GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"Request missing authentication"):
        answer += exactly(tls, 1)
    assert answer.startswith(b"HTTP/1.1 403 "), answer


def ask_h2(tls):
    header = hpack.Encoder().encode([(":method", "GET"), (":scheme", "https"), (":path", "/"), (":authority", HOST)])
    tls.sendall(PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_STREAM_AND_HEADERS, 1, header))
    while True:
        head = exactly(tls, 9)
        kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
        exactly(tls, int.from_bytes(head[:3], "big"))
        if kind == SETTINGS and not flags & ACK:
            tls.sendall(frame(SETTINGS, ACK, 0))
        if stream == 1 and flags & 1:
            return


def connect(node, protocol):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    host, port = node.edge.rsplit(":", 1)
    tls = context.wrap_socket(socket.create_connection((host, int(port))), server_hostname=HOST)
    assert tls.selected_alpn_protocol() == protocol
    {"h2": ask_h2, "http/1.1": ask_h1}[protocol](tls)
    return tls


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--connections", type=int, default=2_000)
    asked = arguments.parse_args()

    too_much = False
    for protocol in ("http/1.1", "h2"):
        with tempfile.TemporaryDirectory(prefix="dormouse-load-") as directory, Node(directory) as node:
            # What the first ones make the node load and allocate once is not theirs.
            for tls in [connect(node, protocol) for _ in range(20)]:
                tls.close()
            eventually("the first connections to be gone", lambda: open_connections(node) == 0, within=30)
            time.sleep(1)
            before = pss_kib(node.process.pid)
            held = [connect(node, protocol) for _ in range(asked.connections)]
            time.sleep(1)
            after = pss_kib(node.process.pid)
            assert open_connections(node) == asked.connections
            each = (after - before) / asked.connections
            too_much |= each > PROMISE_KIB
            print(f"{protocol:<9} {asked.connections} idle connections: {before / 1024:.1f} -> {after / 1024:.1f} MiB, {each:.1f} KiB each (promise: {PROMISE_KIB})", flush=True)
            for tls in held:
                tls.close()
    return too_much


if __name__ == "__main__":
    sys.exit(main())
