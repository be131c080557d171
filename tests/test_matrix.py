"""Every protocol, spoken by other people's clients to real apps, in three states of the microVM: awake, asleep, and falling
asleep while it is called.

An exchange takes a microVM, says something in one protocol and fails unless all of the answer is right. What is peculiar to
one protocol is below the matrix.
"""
import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import socket
import threading
import time
import types
import uuid
from concurrent import futures

import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import httpx_sse
import hyperframe.frame
import pytest
import websockets.asyncio.client
import websockets.sync.client

from harness import clients
from harness.microvm import Microvm
from harness.node import Node
from harness.waiting import NeverHappened, eventually
from test_grpc import Caller

FALLS = 4
SUSPENDS = 3
BODY = os.urandom(300_000)
DIGEST = hashlib.sha256(BODY).hexdigest()
# Ports of apps/grpc_echo.
PLAIN, TLS_H2, TLS_H1, GRPC, GRPC_TLS = 8080, 8443, 8444, 50051, 50052


def open_websocket(vm, path="/ws", *, subprotocols=None, **more):
    """With the token in a subprotocol if there are any, else in the header."""
    return websockets.sync.client.connect(
        f"wss://{vm.endpoint}{path}", ssl=clients.tls(vm.node), subprotocols=subprotocols, open_timeout=120, proxy=None, max_size=None,
        additional_headers={} if subprotocols else {"X-aws-proxy-auth": vm.token()}, **more,
    )


@pytest.fixture(scope="module", autouse=True)
def silent(kitchen):
    """A WebSocket on which nobody says anything while the other tests run, and since when."""
    with open_websocket(kitchen, ping_interval=None) as connection:
        yield connection, time.monotonic()


@pytest.fixture(scope="module")
def pair(node, kitchen_image, grpc_image):
    """Both apps, by name; no other test puts these two to sleep."""
    return {"kitchen": Microvm.run(node, kitchen_image), "polyglot": Microvm.run(node, grpc_image)}


# -- exchanges --------------------------------------------------------------------------------------------------------


def http(vm, port=PLAIN, *, http2, **headers):
    return vm.http(port, http2=http2, **{"X-aws-proxy-port": str(port)} | headers)


def pieces():
    for at in range(0, len(BODY), 50_000):
        yield BODY[at:at + 50_000]


def right_upload(answer):
    assert answer.status_code == 200, f"{answer.status_code} {answer.text!r} {dict(answer.headers)}"
    assert (answer.json()["sha256"], answer.json()["bytes"]) == (DIGEST, len(BODY))
    return answer.json()


def h1_keep_alive(vm):
    with clients.Raw(vm.node, vm.host, timeout=120) as connection:
        seen = []
        for _ in range(3):
            connection.send(f"GET / HTTP/1.1\r\nHost: {vm.endpoint}\r\nX-aws-proxy-auth: {vm.token()}\r\n\r\n".encode())
            answer = connection.answer()
            assert answer.status == 200 and not answer.closed, str(answer)
            seen.append(answer.json()["requests_served"])
        assert seen == sorted(set(seen))


def h1_pipelined(vm):
    """Three requests in one write; three answers in their order."""
    with clients.Raw(vm.node, vm.host, timeout=120) as connection:
        line = f" HTTP/1.1\r\nHost: {vm.endpoint}\r\nX-aws-proxy-auth: {vm.token()}\r\n\r\n"
        connection.send("".join(f"GET /headers?{place}{line}" for place in range(3)).encode())
        paths = []
        for _ in range(3):
            answer = connection.answer()
            assert answer.status == 200, str(answer)
            paths.append(answer.json()["path"])
        assert paths == [f"/headers?{place}" for place in range(3)]


def h1_chunked_both_ways(vm):
    with vm.http() as client:
        right_upload(client.post("/upload", content=pieces()))
        assert client.get("/chunked?count=5").text == "".join(f"piece {number}\n" for number in range(5))


def h1_expect_continue(vm):
    """curl waits for the 100 before it sends, and gives up on that only after a minute."""
    answer = vm.curl(
        "--http1.1", "--expect100-timeout", 60, "--header", f"X-aws-proxy-auth: {vm.token()}", "--header", "Expect: 100-continue",
        "--request", "POST", "--data-binary", "hello", path="/upload",
    )
    assert answer.status == 200 and answer.json()["bytes"] == 5, str(answer)


def h1_early_hints(vm):
    with clients.Raw(vm.node, vm.host, timeout=120) as connection:
        connection.send(f"GET /hints HTTP/1.1\r\nHost: {vm.endpoint}\r\nX-aws-proxy-auth: {vm.token()}\r\nConnection: close\r\n\r\n".encode())
        seen = b""
        while piece := connection.socket.recv(65536):
            seen += piece
    interim, _, rest = seen.partition(b"\r\n\r\n")
    assert interim.startswith(b"HTTP/1.1 103 ") and b"</style.css>" in interim, seen
    assert rest.startswith(b"HTTP/1.1 200 ") and b"requests_served" in rest, seen


def h2_requests(vm):
    with vm.http(http2=True) as client:
        for _ in range(3):
            answer = client.get("/")
            assert (answer.status_code, answer.http_version) == (200, "HTTP/2"), answer.text


def h2_upload(vm):
    with vm.http(http2=True) as client:
        right_upload(client.post("/upload", content=BODY))
        right_upload(client.post("/upload", content=pieces()))


def sse(http2):
    def exchange(vm):
        with vm.http(http2=http2) as client, httpx_sse.connect_sse(client, "GET", "/sse?count=3&every=0.05") as source, asked_if_silent(vm):
            assert [event.json()["tick"] for event in source.iter_sse()] == [1, 2, 3]
    return exchange


def websocket(port=None, *, path="/ws"):
    def exchange(vm):
        offered = ["lambda-microvms", f"lambda-microvms.authentication.{vm.token(port or 8080)}"]
        offered += [f"lambda-microvms.port.{port}"] if port else []
        with open_websocket(vm, path, subprotocols=offered) as connection:
            assert connection.subprotocol == "lambda-microvms"
            for message in ("hello", BODY):
                connection.send(message)
                with asked_if_silent(vm):
                    assert connection.recv(120) == message
    return exchange


# Set while microVMs are told to sleep again and again.
falling = threading.Event()


@contextlib.contextmanager
def asked_if_silent(vm):
    """The next event of a stream, or a message that the app had in hand when it was told to sleep, is no answer that it owes,
    as far as anybody can see from outside (docs/behaviour: a silent stream): it comes when the next request wakes the microVM."""
    heard = threading.Event()

    def ask():
        while falling.is_set() and not heard.wait(15):
            assert http(vm, http2=False).get("/").status_code == 200

    with futures.ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            yield
        finally:
            heard.set()
        asking.result()


def over(port, version, **headers):
    """The web app of apps/grpc_echo, by both kinds of client: it says in which HTTP and over what it was spoken to."""
    def exchange(vm):
        for http2 in (False, True):
            with http(vm, port, http2=http2, **headers) as client:
                seen = right_upload(client.post("/", content=BODY))
                assert seen["version"] == version and seen["scheme"] == ("http" if port == PLAIN else "https"), seen
                assert not [name for name, _ in seen["headers"] if name.startswith("x-aws-proxy")], seen
                with httpx_sse.connect_sse(client, "GET", "/sse?count=3") as source, asked_if_silent(vm):
                    assert [event.json() for event in source.iter_sse()] == [{"tick": tick, "version": version} for tick in (1, 2, 3)]
    return exchange


FORCED = {"X-aws-proxy-force-h2": "true"}


def grpc_calls(port):
    def exchange(vm):
        with Caller(vm, port=port) as call:
            assert call.unary_unary("Unary", b"hello") == b"echo:hello"
            assert list(call.unary_stream("Countdown", b"5")) == [b"5", b"4", b"3", b"2", b"1"]
            assert call.stream_unary("Total", iter([b"1", b"2", b"39"])) == b"42"
            assert list(call.stream_stream("Chat", iter([b"a", b"b"]))) == [b"1:a", b"2:b"]
            _, finished = call.channel.unary_unary("/dormouse.Echo/Unary").with_call(b"x", metadata=call.metadata, timeout=120)
            assert ("x-served-by", "guest") in [(key, value) for key, value in finished.trailing_metadata()]
    return exchange


def grpc_kind(kind, name, request, expected):
    """One kind of call alone: the first thing that a sleeper hears."""
    def exchange(vm):
        with Caller(vm) as call:
            answer = getattr(call, kind)(name, request())
            assert (answer if isinstance(answer, bytes) else list(answer)) == expected
    return exchange


EXCHANGES = {
    "h1 keep-alive": ("kitchen", h1_keep_alive),
    "h1 pipelined": ("kitchen", h1_pipelined),
    "h1 chunked both ways": ("kitchen", h1_chunked_both_ways),
    "h1 expect 100-continue": ("kitchen", h1_expect_continue),
    "h1 early hints": ("kitchen", h1_early_hints),
    "h1 events": ("kitchen", sse(http2=False)),
    "h2 requests": ("kitchen", h2_requests),
    "h2 upload": ("kitchen", h2_upload),
    "h2 events": ("kitchen", sse(http2=True)),
    "websocket": ("kitchen", websocket()),
    "plain app": ("polyglot", over(PLAIN, "1.1")),
    "h2c forced": ("polyglot", over(PLAIN, "2", **FORCED)),
    "tls app of h2": ("polyglot", over(TLS_H2, "2")),
    "tls app of h1": ("polyglot", over(TLS_H1, "1.1")),
    "tls websocket": ("polyglot", websocket(TLS_H2, path="/")),
    "grpc unary": ("polyglot", grpc_kind("unary_unary", "Unary", lambda: b"x", b"echo:x")),
    "grpc server stream": ("polyglot", grpc_kind("unary_stream", "Countdown", lambda: b"3", [b"3", b"2", b"1"])),
    "grpc client stream": ("polyglot", grpc_kind("stream_unary", "Total", lambda: iter([b"40", b"2"]), b"42")),
    "grpc both ways": ("polyglot", grpc_kind("stream_stream", "Chat", lambda: iter([b"a", b"b"]), [b"1:a", b"2:b"])),
    "grpc": ("polyglot", grpc_calls(GRPC)),
    "grpc over tls": ("polyglot", grpc_calls(GRPC_TLS)),
}
MATRIX = pytest.mark.parametrize("name", EXCHANGES)


@MATRIX
def test_awake(pair, name):
    app, exchange = EXCHANGES[name]
    exchange(pair[app])


@MATRIX
def test_asleep(node, pair, name):
    app, exchange = EXCHANGES[name]
    vm = pair[app].suspend()
    wakes = node.wakes()
    exchange(vm)
    assert vm.state == "RUNNING" and node.wakes() == wakes + 1


@pytest.mark.parametrize("name", ["plain app", "h2c forced", "tls app of h2", "tls app of h1", "grpc unary"])
def test_a_connection_that_is_given_up_wakes_nobody(node, pair, name):
    """Connections to an app are kept for a second after a request. TLS and HTTP/2 have words for their end, and a sleeper is not
    woken to hear them."""
    app, exchange = EXCHANGES[name]
    exchange(pair[app])
    vm = pair[app].suspend()
    wakes = node.wakes()
    # Longer than the node keeps a connection (edge.upstream_keepalive_secs) and looks for those to give up.
    with pytest.raises(NeverHappened):
        eventually("a wake", lambda: node.wakes() != wakes or vm.state != "SUSPENDED", within=3)
    assert vm.state == "SUSPENDED" and node.wakes() == wakes


@pytest.mark.parametrize("app", ["kitchen", "polyglot"])
def test_falling_asleep(request, node, pair, app):
    """All protocols at once while the microVM is told to sleep, again and again: calls come before, in and after every step
    of a suspend, and what is under way is suspended too."""
    vm = pair[app]
    mine = {name: exchange for name, (which, exchange) in EXCHANGES.items() if which == app}
    before = node.metrics().total("idle_suspends_total")
    falling.set()
    request.addfinalizer(falling.clear)
    for fall in range(FALLS):
        start = threading.Barrier(len(mine) + 1)

        def at_once(exchange):
            start.wait(60)
            exchange(vm)

        with futures.ThreadPoolExecutor(len(mine)) as pool:
            running = {name: pool.submit(at_once, exchange) for name, exchange in mine.items()}
            start.wait(60)
            for asked in range(SUSPENDS):
                node.client().suspend_microvm(microvmIdentifier=vm.id)
                futures.wait(running.values(), timeout=0.2)
            failed = {name: one.exception() for name, one in running.items() if one.exception()}
        assert not failed, f"fall {fall}: {failed}"
    assert node.metrics().total("idle_suspends_total") >= before + FALLS


# -- HTTP/1.1 ---------------------------------------------------------------------------------------------------------


def test_trailers_of_http_1_are_lost_and_the_body_is_whole(kitchen):
    """pingora cannot carry them (docs/behaviour); a client that asks for them reads an answer without."""
    with clients.Raw(kitchen.node, kitchen.host) as connection:
        connection.send(
            f"POST /upload HTTP/1.1\r\nHost: {kitchen.endpoint}\r\nX-aws-proxy-auth: {kitchen.token()}\r\nTE: trailers\r\nTrailer: X-Sum\r\n"
            "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\n\r\n".encode()
        )
        answer = connection.answer("POST")
        assert answer.status == 200 and answer.json()["bytes"] == 5 and answer.json()["trailers"] == [], str(answer)
        connection.send(f"GET /chunked?count=2 HTTP/1.1\r\nHost: {kitchen.endpoint}\r\nX-aws-proxy-auth: {kitchen.token()}\r\nConnection: close\r\n\r\n".encode())
        seen = b""
        while piece := connection.socket.recv(65536):
            seen += piece
    assert seen.endswith(b"0\r\n\r\n") and b"X-Digest:" not in seen, seen


def test_trailers_of_http_2_arrive(polyglot):
    with H2(polyglot, PLAIN) as client:
        stream = client.request("GET", "/trailers", TE="trailers", **FORCED)
        seen = client.answer(stream)
        assert seen.status == 200 and seen.trailers.get("x-digest") == hashlib.sha256(seen.body).hexdigest(), seen.trailers


def test_an_early_refusal_comes_instead_of_100(kitchen):
    answer = kitchen.curl("--http1.1", "--expect100-timeout", 60, "--header", "Expect: 100-continue", "--data-binary", "hello", path="/upload")
    assert (answer.status, answer.headers["x-dormouse-reason"]) == (403, "token-missing")


# -- HTTP/2 -----------------------------------------------------------------------------------------------------------


class Seen:
    def __init__(self):
        self.status, self.headers, self.body, self.trailers, self.ended, self.reset = None, {}, b"", {}, False, None


class H2:
    """A connection of HTTP/2 with everything in the hand that other clients do by themselves."""

    def __init__(self, vm, port=PLAIN):
        self.vm, self.port, self.token = vm, port, vm.token(port)
        plain = socket.create_connection(("127.0.0.1", vm.node.edge_port), timeout=120)
        self.socket = clients.tls(vm.node, ["h2"]).wrap_socket(plain, server_hostname=vm.host)
        self.connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self.streams, self.goaway = {}, None
        self.connection.initiate_connection()
        self.flush()

    def flush(self):
        self.socket.sendall(self.connection.data_to_send())

    def step(self):
        """Takes what comes next; False at the end of the connection."""
        data = self.socket.recv(65536)
        for event in self.connection.receive_data(data) if data else ():
            stream = self.streams.get(getattr(event, "stream_id", None))
            if isinstance(event, h2.events.ResponseReceived):
                stream.headers = dict(event.headers)
                stream.status = int(stream.headers[":status"])
            elif isinstance(event, h2.events.TrailersReceived):
                stream.trailers = dict(event.headers)
            elif isinstance(event, h2.events.DataReceived):
                stream.body += event.data
                self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                stream.ended = True
            elif isinstance(event, h2.events.StreamReset):
                stream.ended, stream.reset = True, event.error_code
            elif isinstance(event, h2.events.ConnectionTerminated):
                self.goaway = event
        if data:
            self.flush()
        return bool(data)

    def until(self, so):
        while not so():
            assert self.step(), "the connection ended before"

    def request(self, method, path, body=None, **headers):
        stream = self.connection.get_next_available_stream_id()
        self.streams[stream] = Seen()
        fields = [(":method", method), (":scheme", "https"), (":authority", self.vm.endpoint), (":path", path)]
        fields += [("x-aws-proxy-auth", self.token), ("x-aws-proxy-port", str(self.port))]
        fields += [(name.lower(), value) for name, value in headers.items()]
        self.connection.send_headers(stream, fields, end_stream=body is None)
        if body is not None:
            frame = self.connection.max_outbound_frame_size
            for at in range(0, len(body), frame):
                self.connection.send_data(stream, body[at:at + frame])
            self.connection.end_stream(stream)
        self.flush()
        return stream

    def answer(self, stream):
        self.until(lambda: self.streams[stream].ended)
        return self.streams[stream]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


def settled(client):
    """When this is answered, the server's settings and its first window update have come."""
    assert client.answer(client.request("GET", "/")).status == 200
    return client.connection


def test_uploads_are_not_throttled_by_small_windows(kitchen):
    """A megabyte leaves before anything has come back; with AWS's 64 KiB the client's own library would refuse to send it."""
    with H2(kitchen) as client:
        connection = settled(client)
        assert connection.remote_settings.initial_window_size >= 1 << 20
        assert connection.outbound_flow_control_window >= 4 << 20, "of the connection, shared by its streams"
        body = os.urandom(1 << 20)
        seen = client.answer(client.request("POST", "/upload", body))
        assert seen.status == 200 and json.loads(seen.body)["sha256"] == hashlib.sha256(body).hexdigest()


def test_a_hundred_streams_are_open_and_one_more_is_refused_alone(kitchen):
    with H2(kitchen) as client:
        connection = settled(client)
        assert connection.remote_settings.max_concurrent_streams == 100
        streams = [client.request("GET", "/sse?every=3600") for _ in range(100)]
        client.until(lambda: all(b"tick" in client.streams[stream].body for stream in streams))
        with pytest.raises(h2.exceptions.TooManyStreamsError):
            client.request("GET", "/")
        # As a client that does not care.
        connection.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 1000
        connection.remote_settings.acknowledge()
        refused = client.answer(client.request("GET", "/"))
        assert (refused.status, refused.reset) == (None, h2.errors.ErrorCodes.REFUSED_STREAM)
        assert not any(client.streams[stream].ended for stream in streams) and client.goaway is None
        # A place that is given back can be taken.
        connection.reset_stream(streams[0])
        client.flush()
        def served():
            answer = client.answer(client.request("GET", "/"))
            return answer.status == 200
        eventually("the place of a stream that was given up to be free", served, within=30)


def test_a_node_that_stops_says_goaway(run_dir):
    """Over a connection that has carried a request and is idle, and without an error."""
    with Node(run_dir / "leaving") as leaving:
        host = f"{uuid.uuid4()}.microvm.localhost"
        nobody = types.SimpleNamespace(node=leaving, host=host, endpoint=f"{host}:{leaving.edge_port}", token=lambda port: "none")
        with H2(nobody) as client:
            stream = client.request("GET", "/")
            assert client.answer(stream).status == 403
            # The client's library takes nothing more once it has read GOAWAY, and more does come.
            wire = client.socket.makefile("rb")

            def goaway():
                while True:
                    length, kind = int.from_bytes(wire.read(3)), wire.read(1)[0]
                    payload = wire.read(5 + length)[5:]
                    if kind == hyperframe.frame.GoAwayFrame.type:
                        return int.from_bytes(payload[4:8])

            with futures.ThreadPoolExecutor(1) as pool:
                stopped = pool.submit(leaving.stop)
                assert goaway() == h2.errors.ErrorCodes.NO_ERROR
                wire.close()
                client.socket.close()
                assert stopped.result(60) == 0


# -- gRPC -------------------------------------------------------------------------------------------------------------


def leavers(vm):
    with Caller(vm) as call:
        return json.loads(call.unary_unary("Leavers", b""))


@pytest.mark.parametrize("port", [GRPC, GRPC_TLS], ids=["plain", "tls"])
def test_a_cancelled_call_and_a_deadline_reach_the_app(polyglot, port):
    with Caller(polyglot, port=port) as call:
        def heard():
            # One that is cancelled before it has reached the app leaves no trace there, and another is tried.
            name = f"cancelled {port} {time.monotonic_ns()}"
            running = call.channel.unary_unary("/dormouse.Echo/Sleep").future(f"600 {name}".encode(), metadata=call.metadata)
            assert call.unary_unary("Unary", b"on its way") == b"echo:on its way"
            running.cancel()
            return eventually("the app to hear of it", lambda: leavers(polyglot).get(name) == 1, within=10)

        eventually("the app to hear of a cancel", heard, within=60)

        name = f"late {port}"
        with pytest.raises(grpc.RpcError) as late:
            call.unary_unary("Sleep", f"600 {name}".encode(), timeout=1)
        assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        eventually("the app to hear of the deadline", lambda: leavers(polyglot).get(name) == 1, within=60)
        assert 500 < int(call.unary_unary("Patience", b"", timeout=600)) <= 600
        assert call.unary_unary("Patience", b"", timeout=None) == b"for ever"


@pytest.mark.parametrize("port", [GRPC, GRPC_TLS], ids=["plain", "tls"])
def test_a_cancelled_call_wakes_nobody(node, polyglot, port):
    """The reset of a call whose microVM sleeps is worth no wake; the app hears of it when it is awake again."""
    with Caller(polyglot, port=port) as call:
        name = f"left asleep {port}"
        running = call.channel.unary_stream("/dormouse.Echo/Linger")(name.encode(), metadata=call.metadata)
        assert next(running) == b"begun"
        polyglot.suspend()
        wakes = node.wakes()
        running.cancel()
        with pytest.raises(NeverHappened):
            eventually("a wake", lambda: node.wakes() != wakes or polyglot.state != "SUSPENDED", within=3)
    polyglot.resume()
    eventually("the app to hear of it", lambda: leavers(polyglot).get(name) == 1, within=60)


def test_messages_stay_compressed(node, polyglot):
    """A megabyte of zeros is a kilobyte as gzip has it, on the client's side and on the guest's."""
    with Caller(polyglot) as call:
        before = node.metrics()
        method = call.channel.unary_unary("/dormouse.Echo/Unary")
        message = bytes(1 << 20)
        assert method(message, metadata=call.metadata, timeout=120, compression=grpc.Compression.Gzip) == b"echo:" + message
        came = node.metrics().total("edge_bytes_total", direction="in") - before.total("edge_bytes_total", direction="in")
    assert 0 < came < 100_000, f"{came} bytes came of the client"


def test_refusals_are_statuses_of_grpc(node, polyglot, other):
    """The codes that AWS's clients see, and the node's own word for the reason as the message."""
    code = grpc.StatusCode
    asleep = Microvm.run(node, node_image(polyglot), idle={"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 3600, "autoResumeEnabled": False})
    ended = Microvm.run(node, node_image(polyglot))
    asleep.suspend()
    ended_token = ended.token(GRPC)
    ended.terminate()
    own = polyglot.token(GRPC)
    for vm, metadata, expected in [
        (polyglot, [], (code.PERMISSION_DENIED, "token-missing")),
        (polyglot, [("x-aws-proxy-auth", "not.a.token")], (code.PERMISSION_DENIED, "token-unreadable")),
        (polyglot, [("x-aws-proxy-auth", other.token(GRPC))], (code.PERMISSION_DENIED, "token-not-for-this-host")),
        (polyglot, [("x-aws-proxy-auth", polyglot.token(1))], (code.PERMISSION_DENIED, "port-denied")),
        (polyglot, [("x-aws-proxy-auth", own), ("x-aws-proxy-port", "08080")], (code.INVALID_ARGUMENT, "port-malformed")),
        (polyglot, [("x-aws-proxy-auth", polyglot.token(4)), ("x-aws-proxy-port", "4")], (code.UNAVAILABLE, "port-not-listening")),
        (asleep, [("x-aws-proxy-auth", asleep.token(GRPC))], (code.UNAVAILABLE, "suspended")),
        (ended, [("x-aws-proxy-auth", ended_token)], (code.UNAVAILABLE, "terminated")),
    ]:
        with Caller(vm, metadata=metadata) as call:
            with pytest.raises(grpc.RpcError) as refused:
                call.unary_unary("Unary", b"x")
            assert (refused.value.code(), refused.value.details()) == expected
            with pytest.raises(grpc.RpcError) as refused:
                list(call.stream_stream("Chat", iter([b"x"])))
            assert (refused.value.code(), refused.value.details()) == expected
    asleep.terminate()


def node_image(vm):
    return vm.view()["imageArn"]


# -- WebSocket --------------------------------------------------------------------------------------------------------


def test_the_platform_protocols_come_in_any_order_and_with_a_fourth(kitchen):
    names = ["lambda-microvms", f"lambda-microvms.authentication.{kitchen.token(9000)}", "lambda-microvms.port.9000"]
    for order in itertools.permutations(names):
        with open_websocket(kitchen, "/ws?hello=1", subprotocols=list(order)) as connection:
            assert (connection.subprotocol, json.loads(connection.recv(60))) == ("lambda-microvms", {"offered": None}), order
        for place in range(4):
            offered = list(order)
            offered.insert(place, "chat")
            with open_websocket(kitchen, "/ws?hello=1&pick=chat", subprotocols=offered) as connection:
                assert (connection.subprotocol, json.loads(connection.recv(60))) == ("chat", {"offered": "chat"}), offered


def test_a_websocket_whose_both_ends_say_much_before_they_listen(kitchen):
    """The app echoes message by message and reads nothing meanwhile; a message is more than all buffers on the way hold. The
    client reads beside its writing."""
    messages = [letter * (16 << 20) for letter in (b"a", b"b")]

    async def talk():
        async with websockets.asyncio.client.connect(
            f"wss://{kitchen.endpoint}/ws", ssl=clients.tls(kitchen.node), additional_headers={"X-aws-proxy-auth": kitchen.token()},
            open_timeout=60, proxy=None, max_size=None, max_queue=None, ping_interval=None,
        ) as connection:
            async def say():
                for message in messages:
                    await connection.send(message)

            saying = asyncio.create_task(say())
            for message in messages:
                assert await asyncio.wait_for(connection.recv(), 60) == message
            await saying

    asyncio.run(talk())


def test_a_silent_websocket_outlives_pingoras_minute(silent):
    """pingora ends an upgraded connection whose client says nothing for 60 s. The minute passes beside the other tests."""
    connection, began = silent
    with pytest.raises(TimeoutError):
        connection.recv(max(0.1, began + 63 - time.monotonic()))
    connection.send("still there?")
    assert connection.recv(60) == "still there?"
