"""A node that stops, or is followed by a new process, under traffic: what runs is finished, what idles is told, and an upgrade
refuses no connection and answers no 5xx.

A node of its own. Its grace is short, because an event stream that never ends holds an upgrade for as long as that.
"""
import contextlib
import json
import signal
import threading

import httpx
import httpx_sse
import pytest
import websockets.exceptions
import websockets.sync.client

from harness import clients, images
from harness.microvm import Microvm
from harness.node import Node
from harness.waiting import eventually

GRACE = 8


@pytest.fixture(scope="module")
def third(run_dir):
    with Node(run_dir / "third", edge_settings=f"grace_secs = {GRACE}") as node:
        yield node


@pytest.fixture(scope="module")
def image(third):
    return images.build(third, "kitchen-sink", images.app("kitchen_sink"))


@contextlib.contextmanager
def websocket(vm, path="/ws"):
    with websockets.sync.client.connect(
        f"wss://{vm.endpoint}{path}", ssl=clients.tls(vm.node), additional_headers={"X-aws-proxy-auth": vm.token()}, proxy=None, ping_interval=None,
    ) as socket:
        yield socket


def close_code(socket):
    """Waits for the end of a WebSocket; the code that the other side closed it with."""
    with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
        while True:
            socket.recv(timeout=60)
    return closed.value.rcvd and closed.value.rcvd.code


class Traffic:
    """Requests without a pause until `stop()`; every answer and every failure is kept."""

    def __init__(self, *senders):
        self.answers, self.failures, self.over = [], [], threading.Event()
        self.threads = [threading.Thread(target=self.run, args=(sender,), daemon=True) for sender in senders]
        for thread in self.threads:
            thread.start()

    def run(self, sender):
        try:
            for status in sender(self.over):
                self.answers.append(status)
        except Exception as problem:  # Shown by the test.
            self.failures.append(f"{sender.__name__}: {type(problem).__name__}: {problem}")

    def stop(self):
        self.over.set()
        for thread in self.threads:
            thread.join(60)
        return self


def senders(vm):
    """One kept connection of HTTP/1.1, a new one for each request, and HTTP/2 by curl."""
    token = vm.token()

    def kept(over):
        with vm.http(token=token) as client:
            while not over.is_set():
                yield client.get("/").status_code

    def fresh(over):
        while not over.is_set():
            with vm.http(token=token) as client:
                yield client.get("/").status_code

    def h2(over):
        while not over.is_set():
            # One connection, many requests in a row; curl makes a new one when it is told to go.
            answer = clients.curl_many(vm.node, f"{vm.url}/", 20, "--http2", "--header", f"X-aws-proxy-auth: {token}")
            yield from answer

    return kept, fresh, h2


DRAINED = "the edge is drained"
DRAINS = "stopping: nothing new is taken"


def said(node, words):
    """How often the log has these words."""
    return node.log.read_text(errors="replace").count(words)


def upgrade(node):
    """Follows the node by a new process; the exit code of the old one."""
    old = node.process
    node.process = node.spawn("--upgrade")
    node.wait_until_ready()
    return old.wait(60)


def test_sigterm_finishes_what_runs_and_waits_for_nothing_else(third, image):
    vm = Microvm.run(third, image)
    asleep = Microvm.run(third, image)
    token = asleep.token()
    asleep.suspend()
    answers = {}

    def ask(name, vm, path, token=None):
        with vm.http(token=token) as client:
            answers[name] = client.get(path).status_code

    with websocket(vm) as socket, vm.http() as idle, vm.http(http2=True) as idle_h2:
        socket.send("hello")
        assert socket.recv(timeout=60) == "hello"
        assert idle.get("/").status_code == idle_h2.get("/").status_code == 200
        threads = [threading.Thread(target=ask, args=("slow", vm, "/slow?seconds=2")), threading.Thread(target=ask, args=("waking", asleep, "/", token))]
        for thread in threads:
            thread.start()
        eventually("both requests to be under way", lambda: third.open_streams() == 3 or "waking" in answers, within=20)
        drained = said(third, DRAINED)
        third.process.send_signal(signal.SIGTERM)
        assert close_code(socket) == 1001
        for thread in threads:
            thread.join(60)
        assert answers == {"slow": 200, "waking": 200}
        assert third.process.wait(60) == 0
    assert said(third, DRAINED) == drained + 1, "it did not need its whole grace"
    third.start()


def test_an_upgrade_refuses_nobody(third, image):
    vm, asleep = Microvm.run(third, image), Microvm.run(third, image)
    asleep.suspend()
    vmm, before, old = vm.processes(), vm.count(), third.process.pid
    slow = {}

    def ask():
        with vm.http() as client:
            slow["status"] = client.get("/slow?seconds=3").status_code

    with websocket(vm) as socket, vm.http() as client, httpx_sse.connect_sse(client, "GET", "/sse?every=0.2") as source:
        ticks = source.iter_sse()
        assert next(ticks).json()["tick"] == 1
        socket.send("hello")
        assert socket.recv(timeout=60) == "hello"
        traffic = Traffic(*senders(vm))
        in_flight = threading.Thread(target=ask)
        in_flight.start()
        eventually("some traffic", lambda: len(traffic.answers) > 50, within=60)
        assert upgrade(third) == 0
        done = len(traffic.answers)
        eventually("more traffic", lambda: len(traffic.answers) > done + 50 or traffic.failures, within=60)
        traffic.stop()
        in_flight.join(60)
        assert close_code(socket) == 1001
        seen = 1
        with contextlib.suppress(httpx.RemoteProtocolError):
            for tick in ticks:
                seen += 1
                assert tick.json()["tick"] == seen
    assert not traffic.failures, traffic.failures
    assert set(traffic.answers) == {200}, f"{len(traffic.answers)} answers: {set(traffic.answers)}"
    assert slow == {"status": 200}
    assert third.process.pid != old
    assert vm.processes() == vmm, "the microVM runs on in the same process"
    # Nothing was lost or done twice: the app counted every answer, the slow one, and this.
    assert vm.count()["requests_served"] == before["requests_served"] + len(traffic.answers) + 2
    assert asleep.state == "SUSPENDED"
    assert asleep.count()["requests_served"] == 1
    with websocket(vm) as socket:
        socket.send("again")
        assert socket.recv(timeout=60) == "again"


def test_sigusr2_is_an_upgrade_too(third, image):
    vm = Microvm.run(third, image)
    vmm, old = vm.processes(), third.process
    old.send_signal(signal.SIGUSR2)
    assert old.wait(60) == 0
    pid = json.loads((third.data_dir / "node.json").read_text())["pid"]
    assert pid != old.pid
    # It is no child of the tests; they follow it once more.
    third.process = third.spawn("--upgrade")
    third.wait_until_ready()
    assert vm.processes() == vmm
    assert vm.count()["pid"] == 1


def test_a_new_process_that_cannot_start_changes_nothing(third, image):
    vm = Microvm.run(third, image)
    moved = third.directory / "moved.toml"
    moved.write_text(third.config.read_text().replace("[api]\nlisten = \"127.0.0.1:0\"", "[api]\nlisten = \"127.0.0.1:1\""))
    halved = third.directory / "halved.toml"
    halved.write_text(third.config.read_text().replace("[edge]\n", "[edge]\ncertificate = \"/nonexistent.pem\"\n"))
    broken = third.directory / "broken.toml"
    broken.write_text("this is not TOML")
    with vm.http() as client:
        assert client.get("/").status_code == 200
        for config in (moved, halved, broken):
            assert third.spawn("--upgrade", config=config).wait(60) not in (0, 101), config
            assert client.get("/").status_code == 200, f"after {config}, on the connection from before"
    assert third.process.poll() is None
    assert third.admin_get("/readyz")[0] == 200
    # And one that can start still follows.
    assert upgrade(third) == 0
    assert vm.count()["pid"] == 1


def test_a_new_process_that_dies_while_it_waits_gives_the_node_back(third, image):
    vm = Microvm.run(third, image)
    vmm, old, answers = vm.processes(), third.process, []

    def ask(path):
        with vm.http() as client:
            answers.append(client.get(path).status_code)

    slow = threading.Thread(target=ask, args=("/slow?seconds=4",))
    slow.start()
    eventually("the slow request to be under way", lambda: third.open_streams() == 1, within=20)
    drains = said(third, DRAINS)
    new = third.spawn("--upgrade")
    eventually("the old process to drain", lambda: said(third, DRAINS) > drains, within=30)
    new.kill()
    assert new.wait(10) == -9
    # The sockets are still there; this one waits in the kernel's queue.
    held = threading.Thread(target=ask, args=("/",))
    held.start()
    for thread in (slow, held):
        thread.join(60)
    assert answers == [200, 200]
    third.wait_until_ready()
    assert old.poll() is None and third.process is old
    assert vm.processes() == vmm
    assert upgrade(third) == 0, "and it can still be followed"
    assert vm.count()["pid"] == 1

