"""Sends a plan's shots at their times and writes down what came back.

Every shot is a task of its own that begins at its time, whatever became of the ones before. Latencies count from the
planned time. Nothing is tried again, and no client here is told to.
"""
import asyncio
import hashlib
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, fields

import grpc
import httpx
import httpx_sse
import websockets.asyncio.client
import websockets.exceptions

from .. import clients
from ..microvm import ALL_PORTS
from .plan import ASKED, BODY_BYTES, DEADLINE

BLOCK = bytes(range(256)) * 4096  # 1 MiB, as in the guest
# Longer than the node's own hold and dial times together, so that its answer is what is seen, if there is one.
PATIENCE = 180
GRPC_PORT = "50051"
# Ends that were planned. What is not here is a surprise.
EXPECTED = {
    "get": {"200"}, "post": {"200"}, "grpc": {"OK", "DEADLINE_EXCEEDED"}, "ws-short": {"1000"}, "ws-message": {"echoed"},
    "chat-message": {"echoed"}, "leave": {"left", "CANCELLED", "200", "OK"}, "drop": {"502 guest-answer-broken"}, "cut": {"cut"}, "ws": {"1000"}, "chat": {"OK"},
    "sse": {"ended"}, "sse-event": {"seen"}, "suspend": {"done"}, "resume": {"done"},
}


def content(size, start):
    """What guests and clients know without telling each other."""
    return (BLOCK[start:] + BLOCK * (size // len(BLOCK)) + BLOCK[:start])[:size]


def body_pieces(start):
    """A 10 MiB body, in pieces."""
    piece = content(1 << 18, start)
    return [piece] * (BODY_BYTES // len(piece))


def digest_of(pieces):
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


@dataclass
class Outcome:
    """How one shot ended."""

    name: str
    kind: str
    protocol: str
    vm: int
    # Seconds after the start at which it was planned, and how much later it began: the driver's own fault.
    at: float
    late: float = 0.0
    # From the planned time to the end; what the client itself spread over time is not counted.
    seconds: float = 0.0
    status: str = ""
    node_id: str | None = None
    problem: str | None = None
    executions: int | None = None

    @classmethod
    def columns(cls):
        return [field.name for field in fields(cls)]

    def row(self):
        """As a line of the raw data: milliseconds are enough, and ids are for what was a surprise."""
        values = asdict(self) if self.problem else asdict(self) | {"node_id": None}
        return [round(value, 3) if isinstance(value, float) else value for value in values.values()]


class Problem(Exception):
    """An answer that is not the right one."""


class Player:
    """Owns every client of one run."""

    def __init__(self, node, fleet, plan):
        self.node, self.fleet, self.plan = node, fleet, plan
        self.outcomes = []
        self.ledgers = []
        self.sent = {}
        self.started_at = 0.0

    async def play(self):
        self.tokens = [vm.token(ALL_PORTS, minutes=60) for vm in self.fleet]
        async with AsyncExitStack() as stack:
            self.http = [{http: await stack.enter_async_context(self._client(at, http)) for http in ("h1", "h2")} for at in range(len(self.fleet))]
            self.channels = [await stack.enter_async_context(self._channel(vm)) for vm in self.fleet]
            self.zero, self.started_at = asyncio.get_running_loop().time() + 1, time.time() + 1
            self.planned = {shot.name: shot for shot in self.plan.shots}
            streams = [stream for at, mode in enumerate(self.plan.modes) for stream in self._streams(at, mode)]
            self.conversations = {(stream.vm, stream.kind, stream.number): stream for stream in streams if isinstance(stream, Conversation)}
            opened = [asyncio.create_task(stream.run()) for stream in streams]
            if self.plan.app_keepalive:
                await asyncio.gather(*(pair["h1"].get(f"/settings?id=settings&keepalive={self.plan.app_keepalive}") for pair in self.http))
            shots = []
            for shot in self.plan.shots:
                await asyncio.sleep(self.zero + shot.at - self.now())
                shots.append(asyncio.create_task(self._fire(shot)))
            await self._end(shots)
            for stream in streams:
                await stream.finish()
            await self._end(opened)
            for at in range(len(self.fleet)):
                answer = await self.http[at]["h1"].get("/ledger")
                assert answer.status_code == 200, f"the ledger of {self.fleet[at].id}: {answer.status_code} {answer.text[:200]}"
                self.ledgers.append(answer.json())

    @staticmethod
    async def _end(tasks):
        """Waits for all of them; what does not end is ended, and says so."""
        _, stuck = await asyncio.wait(tasks, timeout=PATIENCE + DEADLINE)
        for task in stuck:
            task.cancel("it never ended")
        await asyncio.gather(*tasks)

    def now(self):
        return asyncio.get_running_loop().time()

    def since(self, at):
        """Seconds from a planned time to now."""
        return self.now() - self.zero - at

    # -- clients --------------------------------------------------------------------------------------------------

    def _client(self, at, http):
        return httpx.AsyncClient(
            base_url=self.fleet[at].url, http1=http == "h1", http2=http == "h2", verify=clients.tls(self.node), trust_env=False,
            timeout=PATIENCE, headers={"X-aws-proxy-auth": self.tokens[at]}, limits=httpx.Limits(max_connections=None, max_keepalive_connections=8),
        )

    def _channel(self, vm):
        # As in test_grpc.py: by address, with the name that DNS would have led from.
        options = [
            ("grpc.ssl_target_name_override", vm.host), ("grpc.default_authority", vm.endpoint), ("grpc.enable_retries", 0),
            # Channels to one address share a connection unless told otherwise; each microVM's clients have their own.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        return grpc.aio.secure_channel(f"127.0.0.1:{self.node.edge_port}", grpc.ssl_channel_credentials(self.node.ca.read_bytes()), options)

    def metadata(self, at, name):
        return (("x-aws-proxy-auth", self.tokens[at]), ("x-aws-proxy-port", GRPC_PORT), ("x-id", name))

    def websocket(self, at, name):
        vm = self.fleet[at]
        # Pings that a busy machine may answer late: a missed one would end the connection, and is no byte of the contract.
        return websockets.asyncio.client.connect(
            f"wss://{vm.endpoint}/ws?id={name}", ssl=clients.tls(self.node), additional_headers={"X-aws-proxy-auth": self.tokens[at]},
            open_timeout=PATIENCE, close_timeout=PATIENCE, ping_interval=5, ping_timeout=PATIENCE, proxy=None, max_size=None,
        )

    def _streams(self, at, mode):
        for number in range(2):
            yield Conversation(self, at, "ws", number)
        yield Conversation(self, at, "chat", 0)
        for http in ("h1", "h2"):
            # One with ticks of its own where they do not keep the microVM from falling asleep.
            yield Events(self, at, http, every=0.4 if mode == ASKED and http == "h1" else None)

    # -- shots ----------------------------------------------------------------------------------------------------

    async def _fire(self, shot):
        protocol = shot.detail.get("http") or {"grpc": "grpc", "ws-short": "websocket"}.get(shot.kind, shot.detail.get("how", "api"))
        outcome = Outcome(shot.name, shot.kind, protocol, shot.vm, shot.at, late=self.since(shot.at))
        if shot.kind.endswith("-message"):
            kind = shot.kind.removesuffix("-message")
            stream = self.conversations[shot.vm, kind, shot.detail["stream"] if kind == "ws" else 0]
            return await stream.say(shot, outcome)
        try:
            await getattr(self, "_" + shot.kind.replace("-", "_"))(shot, outcome)
        except Problem as problem:
            outcome.problem = str(problem)
        except (Exception, asyncio.CancelledError) as error:  # Whatever it is, it is a surprise and is reported as one.
            outcome.status = outcome.status or type(error).__name__
            outcome.problem = f"{type(error).__name__}: {error}"
        outcome.seconds = self.since(shot.at) - shot.detail.get("spread", 0)
        self.note(outcome)

    def note(self, outcome):
        if outcome.status not in EXPECTED[outcome.kind] and outcome.problem is None:
            outcome.problem = f"ended with {outcome.status!r}"
        self.outcomes.append(outcome)

    @staticmethod
    def _read(answer, outcome):
        reason = answer.headers.get("x-dormouse-reason")
        outcome.status = f"{answer.status_code} {reason}" if reason else str(answer.status_code)
        outcome.node_id = answer.headers.get("x-amzn-requestid")

    async def _get(self, shot, outcome):
        size, start = shot.detail["bytes"], shot.detail["start"]
        got = bytearray()
        async with self.http[shot.vm][shot.detail["http"]].stream("GET", f"/get?id={shot.name}&bytes={size}&start={start}") as answer:
            self._read(answer, outcome)
            async for piece in answer.aiter_raw():
                got += piece
                await asyncio.sleep(shot.detail["spread"] * len(piece) / size)
        if outcome.status == "200" and got != content(size, start):
            raise Problem(f"{len(got)} bytes came of {size}, or others")

    async def _post(self, shot, outcome):
        pieces, spread = body_pieces(shot.detail["start"]), shot.detail["spread"]

        async def body():
            for piece in pieces:
                yield piece
                await asyncio.sleep(spread / len(pieces))

        length = {"content-length": str(BODY_BYTES)} if shot.detail["framing"] == "length" else {}
        answer = await self.http[shot.vm][shot.detail["http"]].post(f"/post?id={shot.name}", content=body(), headers=length)
        self._read(answer, outcome)
        self.sent[shot.name] = {"bytes": BODY_BYTES, "sha256": digest_of(pieces)}
        if outcome.status == "200" and answer.json() != self.sent[shot.name] | {"id": shot.name, "executions": 1}:
            raise Problem(f"the guest had {answer.text}, the client sent {self.sent[shot.name]}")

    async def _grpc(self, shot, outcome):
        request = content(shot.detail["bytes"], shot.detail["start"])
        call = self.channels[shot.vm].unary_unary("/dormouse.Contract/Unary")(
            request, metadata=self.metadata(shot.vm, shot.name), timeout=DEADLINE)
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            outcome.status = error.code().name
            if outcome.status != "DEADLINE_EXCEEDED":
                raise Problem(f"{outcome.status}: {error.details()} {error.initial_metadata()} {error.trailing_metadata()}") from error
            return
        outcome.status = "OK"
        outcome.node_id = dict(await call.initial_metadata()).get("x-amzn-requestid")
        if answer != b"1:" + request:
            raise Problem(f"{len(answer)} bytes came that begin {answer[:20]!r}; 1: and {len(request)} bytes were right")

    async def _ws_short(self, shot, outcome):
        async with self.websocket(shot.vm, shot.name) as socket:
            outcome.node_id = socket.response.headers.get("x-amzn-requestid")
            for number in range(1, shot.detail["messages"] + 1):
                message = content(500, (shot.detail["start"] + number) % len(BLOCK))
                await socket.send(message)
                if await asyncio.wait_for(socket.recv(), PATIENCE) != b"%d:" % number + message:
                    raise Problem(f"message {number} was echoed wrongly")
        outcome.status = str(socket.close_code)

    async def _leave(self, shot, outcome):
        """Goes away in the middle: of a hold, of an answer, or of the upload of a body of which only a half is ever sent."""
        how, start = shot.detail["how"], shot.detail["start"]
        outcome.status = "left"
        if how == "grpc":
            call = self.channels[shot.vm].unary_unary("/dormouse.Contract/Unary")(b"x", metadata=self.metadata(shot.vm, shot.name))
            code = asyncio.ensure_future(call.code())
            await asyncio.wait([code], timeout=shot.detail["after"])
            call.cancel()
            outcome.status = (await code).name
            return

        async def half():
            for piece in body_pieces(start)[: BODY_BYTES // (1 << 18) // 2]:
                yield piece
            await asyncio.Event().wait()

        length = {"content-length": str(BODY_BYTES)} if shot.detail["framing"] == "length" else {}
        http = how.removeprefix("upload-")
        # A connection of its own, which goes with it.
        async with self._client(shot.vm, http) as client:
            request = (
                client.get(f"/get?id={shot.name}&bytes=100&start=0") if how == http
                else client.post(f"/post?id={shot.name}", content=half(), headers=length))
            try:
                self._read(await asyncio.wait_for(request, shot.detail["after"]), outcome)
            except TimeoutError:
                pass

    async def _drop(self, shot, outcome):
        """The guest takes the request and ends the connection: it must not get it twice."""
        detail = shot.detail
        body = b"x" * 1000 if detail["method"] in ("PUT", "POST") else None
        answer = await self.http[shot.vm][detail["http"]].request(detail["method"], f"/drop?id={shot.name}&how={detail['how']}", content=body)
        self._read(answer, outcome)

    async def _cut(self, shot, outcome):
        """The guest ends its answer early: the client must be able to see that."""
        try:
            answer = await self.http[shot.vm][shot.detail["http"]].get(f"/cut?id={shot.name}")
            self._read(answer, outcome)
        except httpx.RemoteProtocolError:
            outcome.status = "cut"

    async def _suspend(self, shot, outcome):
        await asyncio.to_thread(self.node.client().suspend_microvm, microvmIdentifier=self.fleet[shot.vm].id)
        outcome.status = "done"

    async def _resume(self, shot, outcome):
        await asyncio.to_thread(self.node.client().resume_microvm, microvmIdentifier=self.fleet[shot.vm].id)
        outcome.status = "done"


class Conversation:
    """A WebSocket or a two-way gRPC call that is open all the time. Every message is echoed with its number, in order."""

    def __init__(self, player, vm, kind, number):
        self.player, self.vm, self.kind, self.number = player, vm, kind, number
        self.name = f"{kind}-{vm}-{number}"
        self.outcome = Outcome(self.name, kind, {"ws": "websocket", "chat": "grpc"}[kind], vm, 0.0)
        self.to_send, self.waiting = asyncio.Queue(), asyncio.Queue()
        self.digest, self.said = hashlib.sha256(), 0
        self.broken = False

    async def say(self, shot, outcome):
        outcome.protocol = self.outcome.protocol
        if self.broken:
            return  # Reported once, as the end of the conversation.
        await self.to_send.put((shot, outcome, content(shot.detail["bytes"], shot.detail["start"])))

    async def finish(self):
        await self.to_send.put(None)

    async def run(self):
        try:
            await (self._websocket() if self.kind == "ws" else self._chat())
        except (Exception, asyncio.CancelledError) as error:  # Whatever it is, it is a surprise and is reported as one.
            self.outcome.status = self.outcome.status or type(error).__name__
            self.outcome.problem = f"{type(error).__name__}: {error} (after {self.said} messages, {self.waiting.qsize()} of them unanswered)"
        self.broken = True
        self.outcome.seconds = self.player.since(0)
        self.player.sent[self.name] = {"messages": self.said, "sha256": self.digest.hexdigest()} if self.said else {}
        self.player.note(self.outcome)

    def _count(self, item):
        self.digest.update(item[2])
        self.said += 1
        self.waiting.put_nowait(item)

    def _heard(self, number, echo):
        shot, outcome, message = self.waiting.get_nowait()
        if echo != b"%d:" % number + message:
            raise Problem(f"echo {number} begins {echo[:20]!r} and has {len(echo)} bytes; {len(message)} were sent as {shot.name}")
        outcome.status, outcome.seconds = "echoed", self.player.since(shot.at)
        self.player.note(outcome)
        self.waiting.task_done()

    async def _websocket(self):
        async with self.player.websocket(self.vm, self.name) as socket:
            self.outcome.node_id = socket.response.headers.get("x-amzn-requestid")

            async def send():
                try:
                    while item := await self.to_send.get():
                        self._count(item)
                        await socket.send(item[2])
                    await asyncio.wait_for(self.waiting.join(), PATIENCE)
                finally:
                    await socket.close()

            sender, number = asyncio.create_task(send()), 0
            try:
                # Ends at an orderly close and raises at any other.
                async for echo in socket:
                    number += 1
                    self._heard(number, echo)
                await sender
            finally:
                sender.cancel()
        self.outcome.status = str(socket.close_code)

    async def _chat(self):
        async def questions():
            while item := await self.to_send.get():
                self._count(item)
                yield item[2]

        call = self.player.channels[self.vm].stream_stream("/dormouse.Contract/Chat")(questions(), metadata=self.player.metadata(self.vm, self.name))
        number = 0
        async for echo in call:
            number += 1
            self._heard(number, echo)
        self.outcome.status = (await call.code()).name
        if not self.waiting.empty():
            raise Problem(f"it ended and {self.waiting.qsize()} messages were not echoed")


class Events:
    """A stream of server-sent events that is open all the time. The guest numbers them and at the end says how many."""

    def __init__(self, player, vm, http, every):
        self.player, self.vm, self.every = player, vm, every
        self.name = f"sse-{vm}-{http}"
        self.outcome = Outcome(self.name, "sse", http, vm, 0.0)

    async def run(self):
        seen = 0
        try:
            url = f"/sse?id={self.name}" + (f"&every={self.every}" if self.every else "")
            client = self.player.http[self.vm][self.outcome.protocol]
            async with httpx_sse.aconnect_sse(client, "GET", url, timeout=httpx.Timeout(PATIENCE, read=None)) as source:
                self.player._read(source.response, self.outcome)
                async for event in source.aiter_sse():
                    seen += 1
                    if event.id != str(seen):
                        raise Problem(f"event {event.id} came after event {seen - 1}")
                    if event.event == "end":
                        self.outcome.status = "ended"
                    elif shot := self.player.planned.get(event.data):
                        told = Outcome(f"{self.name}:{seen}", "sse-event", self.outcome.protocol, self.vm, shot.at, status="seen")
                        told.seconds = self.player.since(shot.at)
                        self.player.note(told)
        except (Exception, asyncio.CancelledError) as error:  # Whatever it is, it is a surprise and is reported as one.
            self.outcome.status = type(error).__name__
            self.outcome.problem = f"{type(error).__name__}: {error} (after {seen} events)"
        self.player.sent[self.name] = {"events": seen - 1}
        self.outcome.seconds = self.player.since(0)
        self.player.note(self.outcome)

    async def finish(self):
        name = f"end-of-{self.name}"
        answer = await self.player.http[self.vm]["h1"].get(f"/end?id={name}&of={self.name}")
        if answer.status_code != 200:
            raise Problem(f"asking {self.name} to end was answered with {answer.status_code}")
