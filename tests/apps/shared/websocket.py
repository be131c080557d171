"""The server's half of RFC 6455 with the standard library alone: just enough to echo.

Owns one upgraded connection until it closes. Never negotiates extensions.
"""
import base64
import hashlib
import struct

GUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA


def accept_key(client_key):
    """What Sec-WebSocket-Accept must say for this Sec-WebSocket-Key."""
    return base64.b64encode(hashlib.sha1((client_key + GUID).encode()).digest()).decode()


def accept(handler, headers=()):
    """Answers the handshake that an http.server's handler has read. The connection is a WebSocket from here on."""
    handler.send_response(101)
    handler.send_header("Upgrade", "websocket")
    handler.send_header("Connection", "Upgrade")
    handler.send_header("Sec-WebSocket-Accept", accept_key(handler.headers["Sec-WebSocket-Key"]))
    for name, value in headers:
        handler.send_header(name, value)
    handler.end_headers()
    handler.close_connection = True


def read_exactly(stream, size):
    data = stream.read(size)
    if len(data) != size:
        raise ConnectionError("the client went away in the middle of a frame")
    return data


def read_frame(stream):
    """One frame as (final, opcode, payload)."""
    first, second = read_exactly(stream, 2)
    size = second & 0x7F
    if size == 126:
        (size,) = struct.unpack("!H", read_exactly(stream, 2))
    elif size == 127:
        (size,) = struct.unpack("!Q", read_exactly(stream, 8))
    mask = read_exactly(stream, 4) if second & 0x80 else b"\0\0\0\0"
    payload = read_exactly(stream, size)
    # One big XOR: a loop over bytes would take seconds for a megabyte in an emulated guest.
    key = (mask * (size // 4 + 1))[:size]
    plain = (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
    return bool(first & 0x80), first & 0x0F, plain


def write_frame(stream, opcode, payload):
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, size)
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 127, size)
    stream.write(head + payload)
    stream.flush()


def echo(reader, writer):
    """Sends every message back as it came until the client closes; the close code goes back as well."""
    message, kind = b"", TEXT
    while True:
        final, opcode, payload = read_frame(reader)
        if opcode == PING:
            write_frame(writer, PONG, payload)
        elif opcode == CLOSE:
            write_frame(writer, CLOSE, payload)
            return
        elif opcode in (TEXT, BINARY, CONTINUATION):
            if opcode != CONTINUATION:
                kind = opcode
            message += payload
            if final:
                write_frame(writer, kind, message)
                message = b""
