"""Clients that hang up while their request is held: each frees its place at once, and nothing of it reaches the guest. And
clients of open streams that hang up while the microVM sleeps: that is told to no guest before it wakes, and wakes none.

The hold is made to last by stopping (SIGSTOP) the VMM processes that wait ready, one of which the wake takes. So what is
seen does not depend on how fast anything is.
"""
import asyncio
import contextlib
import os
import signal

from ..microvm import ALL_PORTS
from ..waiting import eventually
from .play import Player

WAITING = "idle_requests_waiting"
OPEN = "edge_open_streams"
WITHIN = 20


@contextlib.contextmanager
def stopped(pids):
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def ready_processes(node):
    """VMM processes that have no microVM yet."""
    taken = {pid for pid, _ in node.processes(of=node.data_dir / "microvms")}
    return [pid for pid, _ in node.processes() if pid not in taken]


def leave_in_the_hold(node, vm, verdict):
    """Two clients of each kind come to a sleeping microVM, are held, and leave; how many did. What is wrong is told to the
    verdict."""
    vm.suspend()
    ready = eventually("a VMM process that waits ready", lambda: ready_processes(node), within=60)
    wakes, before = node.wakes(), node.metrics().total(WAITING)
    player = Player(node, [vm], verdict.plan)

    async def come_and_go():
        player.tokens = [vm.token(ALL_PORTS)]
        async with contextlib.AsyncExitStack() as stack:
            channel = await stack.enter_async_context(player._channel(vm))
            clients = [await stack.enter_async_context(player._client(0, http)) for http in ("h1", "h2")]
            coming = []
            for number in range(2):
                for client in clients:
                    coming.append(client.get(f"/get?id=held-{len(coming)}&bytes=1&start=0"))
                    coming.append(client.post(f"/post?id=held-{len(coming)}", content=b"x" * 100_000))
                coming.append(player.websocket(0, f"held-{len(coming)}").__aenter__())
                coming.append(unary(channel, player.metadata(0, f"held-{len(coming)}")))
            held = [asyncio.ensure_future(one) for one in coming]
            await asyncio.to_thread(
                eventually, f"{len(held)} held requests", lambda: node.metrics().total(WAITING) == before + len(held), within=WITHIN)
            for one in held:
                one.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            # The clients of h1 and h2 are still there; it is their requests that have gone.
            for client in clients:
                await client.aclose()
            await asyncio.to_thread(eventually, "every place to be free", lambda: node.metrics().total(WAITING) == before, within=WITHIN)
            return len(held)

    async def unary(channel, metadata):
        call = channel.unary_unary("/dormouse.Contract/Unary")(b"x", metadata=metadata)
        try:
            return await call
        finally:
            call.cancel()

    try:
        with stopped(ready):
            left = asyncio.run(come_and_go())
            if node.wakes() != wakes:
                verdict.surprise("the hold was over before its clients had left, so that leaving it was not shown")
    except AssertionError as never:
        verdict.surprise(f"clients that left while they were held: {never}")
        return 0
    with vm.http() as client:
        ledger = client.get("/ledger").json()
    for name in ledger:
        if name.startswith("held-"):
            verdict.surprise(f"{name} left while it was held, and the guest executed it: {ledger[name]}", node_ids=ledger[name]["node_ids"])
    return left


def leave_while_asleep(node, vm, verdict):
    """Clients with open streams leave a microVM that sleeps; how many did."""
    player = Player(node, [vm], verdict.plan)
    before = node.metrics().total(OPEN)

    async def listen(client, name, heard):
        async with client.stream("GET", f"/sse?id={name}") as events:
            async for _ in events.aiter_lines():
                heard.set()

    async def come_and_go():
        player.tokens = [vm.token(ALL_PORTS)]
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(player._client(0, http)) for http in ("h1", "h2")]
            heard = [asyncio.Event() for _ in clients]
            streams = [asyncio.create_task(listen(client, f"parked-{at}", heard[at])) for at, client in enumerate(clients)]
            socket = await player.websocket(0, "parked-socket")
            await socket.send(b"hello")
            await socket.recv()
            await asyncio.wait_for(asyncio.gather(*(one.wait() for one in heard)), WITHIN)
            await asyncio.to_thread(vm.suspend)
            wakes = node.wakes()
            for one in streams:
                one.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            # Without a close frame, whose bytes would be for the guest and wake it.
            socket.transport.abort()
            for client in clients:
                await client.aclose()
            await asyncio.to_thread(eventually, "every stream to be gone", lambda: node.metrics().total(OPEN) == before, within=WITHIN)
            return len(streams) + 1, wakes

    try:
        left, wakes = asyncio.run(come_and_go())
    except AssertionError as never:
        verdict.surprise(f"clients that left while the microVM slept: {never}")
        return 0
    if vm.state != "SUSPENDED" or node.wakes() != wakes:
        verdict.surprise(f"clients that left a sleeping microVM woke it: {vm.id} is {vm.state}")
    return left
