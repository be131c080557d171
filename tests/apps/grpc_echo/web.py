"""An ASGI app on hypercorn: HTTP/1.1 and HTTP/2 in the clear on 8080, over TLS on 8443, HTTP/1.1 alone over TLS on 8444.

Owns its thread and event loop. Every answer says which HTTP the app was spoken to in.
"""
import asyncio
import hashlib
import json
import threading
from pathlib import Path

from hypercorn.asyncio import serve as run
from hypercorn.config import Config

HERE = Path(__file__).parent


async def app(scope, receive, send):
    kind = scope["type"]
    if kind == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": message["type"] + ".complete"})
        await send({"type": "lifespan.shutdown.complete"})
    elif kind == "websocket":
        await echo(receive, send)
    elif scope["path"] == "/sse":
        await events(scope, receive, send)
    else:
        await answer(scope, receive, send)


async def echo(receive, send):
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "bytes": message.get("bytes"), "text": message.get("text")})


async def answer(scope, receive, send):
    """What came: the version, the body's digest and size, the trailers if any were seen."""
    digest, size, more = hashlib.sha256(), 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        digest.update(message.get("body", b""))
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    seen = {
        "version": scope["http_version"], "scheme": scope["scheme"], "method": scope["method"], "sha256": digest.hexdigest(), "bytes": size,
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
    }
    body = json.dumps(seen).encode()
    headers = [(b"content-type", b"application/json")]
    if scope["path"] == "/trailers":
        await send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": True})
        await send({"type": "http.response.body", "body": body, "more_body": False})
        await send({"type": "http.response.trailers", "headers": [(b"x-digest", hashlib.sha256(body).hexdigest().encode())]})
        return
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def events(scope, receive, send):
    """Ticks, `?count` of them; the first at once."""
    count = int(scope["query_string"].decode().partition("count=")[2] or 1)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for number in range(1, count + 1):
        data = json.dumps({"tick": number, "version": scope["http_version"]})
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": number < count})
        if number < count:
            await asyncio.sleep(0.05)


def config(port, *, alpn=()):
    settings = Config()
    settings.bind = [f"0.0.0.0:{port}"]
    settings.accesslog = None
    if alpn:
        settings.certfile, settings.keyfile = str(HERE / "certificate.pem"), str(HERE / "key.pem")
        settings.alpn_protocols = list(alpn)
    return settings


def serve():
    """Returns when all three ports listen."""
    ready = threading.Event()

    async def never():
        ready.set()
        await asyncio.Event().wait()

    async def all_ports():
        await asyncio.gather(*(
            run(app, one, shutdown_trigger=never)
            for one in (config(8080), config(8443, alpn=("h2", "http/1.1")), config(8444, alpn=("http/1.1",)))
        ))

    threading.Thread(target=asyncio.run, args=(all_ports(),), daemon=True).start()
    ready.wait(60)
