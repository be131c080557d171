"""A shell in a microVM, as people use it: over a WebSocket that any library opens (aws-behaviour §2.1)."""
import hashlib
import json
import re
import uuid

import botocore.exceptions
import httpx
import pytest
import websockets.exceptions
import websockets.sync.client

from harness import clients
from harness.microvm import Microvm
from harness.waiting import eventually

WITHIN = 60
# What the shell prints, with the colours and modes that a terminal takes out.
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()=>][0-9A-B]?")


def connectors(node, *names):
    region = node.client().meta.region_name
    return [f"arn:aws:lambda:{region}:aws:network-connector:aws-network-connector:{name}" for name in names]


@pytest.fixture(scope="module")
def vm(node, kitchen_image):
    """A microVM that lets shells in."""
    vm = Microvm.run(node, kitchen_image, ingressNetworkConnectors=connectors(node, "HTTP_INGRESS", "SHELL_INGRESS"))
    yield vm
    node.client().terminate_microvm(microvmIdentifier=vm.id)


def shell_token(vm, minutes=15):
    answer = vm.node.client().create_microvm_shell_auth_token(microvmIdentifier=vm.id, expirationInMinutes=minutes)
    vm.node.minted.extend(answer["authToken"].values())
    assert list(answer["authToken"]) == ["X-aws-proxy-auth"]
    return answer["authToken"]["X-aws-proxy-auth"]


class Shell:
    """A terminal emulator of few words."""

    def __init__(self, vm, *, token=None, path="/", extra=(), headers=None, **options):
        protocols = ["lambda-microvms", *([] if headers else [f"lambda-microvms.authentication.{token or shell_token(vm)}"]), *extra]
        self.socket = websockets.sync.client.connect(
            f"wss://{vm.endpoint}{path}", ssl=clients.tls(vm.node), subprotocols=protocols, additional_headers=headers, proxy=None, legacy=True,
            open_timeout=WITHIN, close_timeout=WITHIN, max_size=None, **options,
        )
        first = self.socket.recv(timeout=WITHIN)
        assert isinstance(first, str), "the first frame is text"
        self.init = json.loads(first)
        self.seen = b""

    def type(self, text):
        self.socket.send(text)

    def until(self, wanted):
        """Reads until `wanted` has been printed; everything up to it, which is then forgotten."""
        wanted = wanted.encode()
        while wanted not in ESCAPES.sub(b"", self.seen):
            try:
                piece = self.socket.recv(timeout=WITHIN)
            except TimeoutError:
                raise AssertionError(f"{wanted!r} was not printed within {WITHIN} s; what was: {self.seen!r}") from None
            assert isinstance(piece, bytes), f"what is printed comes in binary frames, not {piece!r}"
            self.seen += piece
        clean = ESCAPES.sub(b"", self.seen)
        before, _, self.seen = clean.partition(wanted)
        return before.decode(errors="replace")

    def run(self, command):
        """What a command prints. The shell's own echo of the line does not have the marks in it."""
        self.type(f"echo begin-$((40+2)); {command}; echo end-$((40+2))\n")
        self.until("begin-42\r\n")
        return self.until("end-42\r\n").replace("\r\n", "\n").strip()

    def resize(self, columns, rows):
        self.type(json.dumps({"type": "resize", "cols": columns, "rows": rows}))

    def exit(self):
        """Code and reason of the Close that follows."""
        self.type("exit\n")
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            while True:
                self.socket.recv(timeout=WITHIN)
        return closed.value.rcvd.code, closed.value.rcvd.reason

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


def test_a_shell_is_a_terminal_in_the_apps_world(vm):
    with Shell(vm) as shell:
        assert shell.init["type"] == "session_init"
        assert str(uuid.UUID(shell.init["session_id"])) == shell.init["session_id"]
        assert shell.socket.subprotocol == "lambda-microvms"
        assert re.fullmatch(r"/dev/pts/\d+", shell.run("tty"))
        assert shell.run("stty size") == "0 0", "nobody has told it a size"
        shell.resize(132, 43)
        eventually("the terminal to have its size", lambda: shell.run("stty size") == "43 132", within=WITHIN)
        assert shell.run("id -u; echo $TERM $HOME; pwd") == "0\nxterm /root\n/app"
        assert shell.run("tr '\\0' ' ' </proc/1/cmdline") == "python3 app.py", "the app is PID 1 of what it sees"
        assert shell.run("cat /proc/self/cgroup") == "0::/"
        assert shell.run("echo $AWS_LAMBDA_MICROVM_IMAGE_NAME") == "kitchen-sink", "the app's variables are the shell's"
        # Text and binary frames are typed alike, and so is JSON that is no resize.
        shell.socket.send(b"echo ready-$((1+1)); cat; echo done-$((1+1))\n")
        shell.until("ready-2\r\n")
        # Once by the terminal's echo, once by cat.
        shell.type('{"type":"other","cols":1}\n')
        shell.until('{"type":"other","cols":1}\r\n')
        shell.until('{"type":"other","cols":1}\r\n')
        shell.socket.send(b"\x04")
        shell.until("done-2")


@pytest.mark.parametrize("path, extra", [("/shell", ()), ("/aws/lambda-microvms/runtime/v1/shell?x=1", ("lambda-microvms.port.8022",))])
def test_path_and_port_8022_make_no_difference(vm, path, extra):
    with Shell(vm, path=path, extra=extra) as shell:
        assert shell.run("echo hello") == "hello"


def test_the_header_carries_a_shell_token_too(vm):
    with Shell(vm, headers={"X-aws-proxy-auth": shell_token(vm)}) as shell:
        assert shell.run("echo hello") == "hello"


def test_exit_is_a_close_that_says_so(vm):
    with Shell(vm) as shell:
        assert shell.exit() == (1000, "shell exited")


def test_control_c_reaches_the_job_and_not_the_shell(vm):
    with Shell(vm) as shell:
        shell.type("echo going-$((1+1)); sleep 4711\n")
        shell.until("going-2")
        eventually("the job to run", lambda: runs(vm, "sleep 4711"), within=WITHIN)
        shell.type("\x03")
        shell.type("echo status-$?\n")
        shell.until("status-130\r\n")
        assert not runs(vm, "sleep 4711")


def test_much_output_arrives_whole_at_a_slow_reader(vm):
    lines = 60_000
    with Shell(vm, max_queue=1) as shell:
        text = shell.run(f"seq {lines}")
        # This client takes nothing more while its queue is full, not even the answer to its Close: it reads to the end.
        assert shell.exit() == (1000, "shell exited")
    assert text.split() == [str(number) for number in range(1, lines + 1)]


def test_a_large_paste_arrives_whole(vm):
    with Shell(vm) as shell:
        shell.type("stty -echo; echo ready-$((1+1)); md5sum | cut -c1-32; stty echo\n")
        shell.until("ready-2\r\n")
        paste = "".join(f"line {number} {'x' * 80}\n" for number in range(5_000))
        shell.type(paste)
        shell.socket.send(b"\x04")
        shell.until(hashlib.md5(paste.encode()).hexdigest())


def runs(vm, command):
    """Whether a process of this command line is there, as a second shell sees it."""
    with Shell(vm) as witness:
        listed = witness.run("for d in /proc/[0-9]*; do tr '\\0' ' ' <$d/cmdline; echo; done 2>/dev/null")
    return any(line.strip() == command for line in listed.splitlines())


def test_a_client_that_leaves_takes_its_job_along(vm):
    with Shell(vm) as shell:
        shell.type("echo going-$((1+1)); sleep 4712\n")
        shell.until("going-2")
        eventually("the job to run", lambda: runs(vm, "sleep 4712"), within=WITHIN)
    eventually("the job to be gone", lambda: not runs(vm, "sleep 4712"), within=WITHIN)


def test_a_shell_wakes_a_sleeper_and_sleeps_with_it(run, node, kitchen_image):
    vm = run(kitchen_image, ingressNetworkConnectors=connectors(node, "HTTP_INGRESS", "SHELL_INGRESS"))
    vm.suspend()
    with Shell(vm) as shell:
        assert vm.state == "RUNNING"
        shell.run("remembered=kept")
        vm.suspend()
        # The next key stroke wakes it, and the shell is where it was.
        assert shell.run("echo $remembered") == "kept"
        assert vm.state == "RUNNING"


def refused(vm, protocols, **options):
    with pytest.raises(websockets.exceptions.InvalidStatus) as refusal:
        websockets.sync.client.connect(f"wss://{vm.endpoint}/", ssl=clients.tls(vm.node), subprotocols=protocols, proxy=None, open_timeout=WITHIN, **options)
    answer = refusal.value.response
    return answer.status_code, answer.headers.get("x-dormouse-reason")


def test_who_may_not_have_a_shell(vm, kitchen):
    token = shell_token(vm)
    authentication = f"lambda-microvms.authentication.{token}"
    with vm.http(token=token) as client:
        answer = client.get("/")
        assert (answer.status_code, answer.content, answer.headers["x-dormouse-reason"]) == (502, b"", "shell-token")
    assert refused(vm, ["lambda-microvms", authentication, "lambda-microvms.port.8080"]) == (403, "port-denied")
    assert refused(vm, [authentication]) == (403, "subprotocol-base-missing")
    assert refused(kitchen, ["lambda-microvms", authentication]) == (403, "token-not-for-this-host")
    # An ordinary token opens ports, and 8022 is one of them like any other.
    ordinary = vm.token((1, 65535))
    assert refused(vm, ["lambda-microvms", f"lambda-microvms.authentication.{ordinary}", "lambda-microvms.port.8022"]) == (502, "port-not-listening")


@pytest.mark.parametrize("ingress, told", [
    (["HTTP_INGRESS"], "Shell access requires SHELL_INGRESS network connector to be configured on the MicroVM."),
    (["ALL_INGRESS", "SHELL_INGRESS"], "ALL_INGRESS cannot be combined with other ingress network connectors; use HTTP_INGRESS and/or SHELL_INGRESS instead"),
])
def test_a_shell_token_needs_the_connector(run, node, kitchen_image, ingress, told):
    vm = run(kitchen_image, wait=False, ingressNetworkConnectors=connectors(node, *ingress))
    with pytest.raises(botocore.exceptions.ClientError) as refusal:
        shell_token(vm)
    error = refusal.value.response
    assert (error["Error"]["Code"], error["Error"]["Message"]) == ("ValidationException", told)


def test_one_shell_too_many_is_refused_and_a_place_comes_free(vm):
    token = shell_token(vm)
    shells = [Shell(vm, token=token) for _ in range(8)]
    try:
        assert refused(vm, ["lambda-microvms", f"lambda-microvms.authentication.{token}"]) == (503, "too-many-shells")
    finally:
        for shell in shells:
            shell.socket.close()

    def opens():
        with Shell(vm, token=token) as shell:
            return shell.run("echo hello") == "hello"

    eventually("a place for a shell", opens, within=WITHIN)


def test_too_large_a_message_ends_the_shell_with_a_reason(vm):
    with Shell(vm) as shell:
        shell.socket.send(b"x" * ((1 << 20) + 1))
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            while True:
                shell.socket.recv(timeout=WITHIN)
    assert closed.value.rcvd.code == 1009
