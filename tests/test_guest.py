"""What an app finds in its guest: variables, capabilities, limits, a network that leads where it may and nowhere else, credentials."""
import datetime
import errno
import json
import socket
import socketserver
import struct
import subprocess
import threading

import botocore.exceptions
import pytest

from harness import images
from harness.microvm import Microvm
from harness.node import Node, free_addresses
from harness.waiting import eventually

# Of documentation's networks (RFC 5737). This host gets both for the tests' time, and the settings open one of them to guests: the
# "internet" of a machine that has none. The other one stays what a public address of the host is.
OPEN, CLOSED = "203.0.113.9", "203.0.113.10"
# What an app reads of a connection that was reset, by what it is about to do: read, write, or say that it writes no more.
CUT = (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)
APP = images.answering('''
import json, os, socket, subprocess, threading, urllib.parse

held = {}


def fetch(host, port, say):
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(say.encode())
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode()


def hold(host, port):
    held["one"] = socket.create_connection((host, int(port)), timeout=20)
    return "held"


def say(text):
    held["one"].sendall(text.encode())
    return held["one"].recv(100).decode()


def run(command):
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def read(path):
    with open(path) as file:
        return file.read()


def lookup(name):
    return sorted({found[4][0] for found in socket.getaddrinfo(name, None, socket.AF_INET)})


def answer(target):
    path, _, query = target.partition("?")
    arguments = dict(urllib.parse.parse_qsl(query))
    try:
        said = {"answer": globals()[path[1:]](**arguments)}
    except Exception as error:
        said = {"error": type(error).__name__, "errno": getattr(error, "errno", None), "text": str(error)}
    return json.dumps(said).encode()


def env():
    return dict(os.environ)


AT_START = {}


def at_start():
    return AT_START


try:
    AT_START["said"] = fetch(os.environ["WHERE"], os.environ["PORT"], "from the build")
except Exception as error:
    AT_START["error"] = repr(error)
''')
DOCKERFILE = b"""FROM public.ecr.aws/lambda/microvms:al2023-minimal
RUN dnf install -y python3 && dnf clean all
COPY app.py /
EXPOSE 8080
CMD ["python3", "/app.py"]
"""


class Echo(socketserver.ThreadingTCPServer):
    """Says back what it hears, and remembers who came."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, address):
        self.heard = []
        echo = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                while data := self.request.recv(65536):
                    echo.heard.append(data.decode())
                    self.request.sendall(b"echo: " + data)

        super().__init__((address, 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self):
        return str(self.server_address[1])


class Names(threading.Thread):
    """A name server that knows one name, and says that it has more to say than fits if it is asked for `long.example`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self.socket.getsockname()[1]
        self.start()

    def run(self):
        while True:
            question, asker = self.socket.recvfrom(4096)
            name, at = [], 12
            while question[at]:
                name.append(question[at + 1:at + 1 + question[at]].decode())
                at += 1 + question[at]
            known, kind = ".".join(name) == "shop.example", question[at + 1:at + 3]
            found = known and kind == b"\0\1"
            head = question[:2] + (b"\x81\x80" if known else b"\x81\x83") + struct.pack(">HHHH", 1, found, 0, 0)
            record = b"\xc0\x0c\0\1\0\1" + struct.pack(">IH", 60, 4) + socket.inet_aton(OPEN) if found else b""
            self.socket.sendto(head + question[12:at + 5] + record, asker)


@pytest.fixture(scope="module")
def addresses():
    def change(what, address):
        return subprocess.run(["ip", "address", what, f"{address}/32", "dev", "lo"], capture_output=True, text=True)

    given = [change("replace", address) for address in (OPEN, CLOSED)]
    if any(done.returncode for done in given):
        pytest.skip(f"SKIPPED: this host gets no addresses for a test ({given[0].stderr.strip()}); run it as root")
    yield
    for address in (OPEN, CLOSED):
        change("del", address)


@pytest.fixture(scope="module")
def outside(addresses):
    """A host that guests may connect to."""
    with Echo(OPEN) as echo:
        yield echo
        echo.shutdown()


@pytest.fixture(scope="module")
def place(run_dir, outside):
    """A node of its own, whose guests may reach that host."""
    names = Names()
    # It comes back on the same ports.
    edge, api, admin = free_addresses(3)
    more = f'[guest]\negress_allow = ["{OPEN}/32"]\nname_servers = ["{names.address}"]\nroles = "{run_dir / "roles"}"\n'
    write_roles(run_dir, "first")
    with Node(run_dir / "guest", edge=edge, api=api, admin=admin, more=more) as node:
        yield node


ROLE = "arn:aws:iam::000000000000:role/with-credentials"


def write_roles(run_dir, secret):
    (run_dir / "roles").write_text(f"[{ROLE}]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = {secret}\naws_session_token = session\n")


def connector(node, name):
    return f"arn:aws:lambda:{node.client().meta.region_name}:aws:network-connector:aws-network-connector:{name}"


@pytest.fixture(scope="module")
def image(place, outside):
    variables = {"WHERE": OPEN, "PORT": outside.port, "MINE": "yes"}
    return images.build(place, "guest", images.zip_of(**{"app.py": APP, "Dockerfile": DOCKERFILE}), environmentVariables=variables)


@pytest.fixture(scope="module")
def powerful(place, outside):
    """The same with every capability, and without a network from its build on."""
    archive = images.zip_of(**{"app.py": APP, "Dockerfile": DOCKERFILE})
    return images.build(
        place, "powerful", archive, environmentVariables={"WHERE": OPEN, "PORT": outside.port}, additionalOsCapabilities=["ALL"],
        egressNetworkConnectors=[connector(place, "NO_EGRESS")],
    )


class Guest(Microvm):
    def ask(self, what, **arguments):
        with self.http() as client:
            return client.get(f"/{what}", params=arguments).json()

    def get(self, what, **arguments):
        answer = self.ask(what, **arguments)
        assert "answer" in answer, f"{what} {arguments}: {answer}"
        return answer["answer"]


@pytest.fixture(scope="module")
def guest(place, image):
    return Guest.run(place, image)


@pytest.fixture(scope="module")
def strong(place, powerful):
    return Guest.run(place, powerful)


def test_an_app_knows_its_image_and_its_region(guest, place):
    env = guest.get("env")
    region = place.client().meta.region_name
    assert env["AWS_LAMBDA_MICROVM_IMAGE_NAME"] == "guest"
    assert env["AWS_LAMBDA_MICROVM_IMAGE_ARN"] == f"arn:aws:lambda:{region}:000000000000:microvm-image:guest"
    assert (env["AWS_LAMBDA_MICROVM_IMAGE_VERSION"], env["AWS_REGION"], env["MINE"]) == ("1.0", region, "yes")


def capabilities(guest):
    lines = guest.get("read", path="/proc/self/status").splitlines()
    return {name: int(value, 16) for name, value in (line.split(":\t") for line in lines) if name in ("CapEff", "CapPrm", "CapBnd", "CapInh")}


def test_root_has_what_docker_gives(guest):
    assert capabilities(guest) == {"CapEff": 0xA80425FB, "CapPrm": 0xA80425FB, "CapBnd": 0xA80425FB, "CapInh": 0}
    assert "denied" in guest.get("run", command="mount -t tmpfs none /mnt")
    assert "Read-only" in guest.get("run", command="mkdir /sys/fs/cgroup/mine")
    assert guest.get("run", command="test -e /dev/fuse || echo none") == "none\n"


def test_all_capabilities_are_all_of_them(strong):
    found = capabilities(strong)
    last = int(strong.get("read", path="/proc/sys/kernel/cap_last_cap"))
    everything = (1 << (last + 1)) - 1
    assert {name: found[name] for name in ("CapEff", "CapPrm", "CapBnd")} == dict.fromkeys(("CapEff", "CapPrm", "CapBnd"), everything)
    assert strong.get("run", command="mount -t tmpfs none /mnt && mkdir /sys/fs/cgroup/mine && test -c /dev/fuse && echo fine") == "fine\n"
    # Frozen and thawed as a whole, whatever it has made of its cgroups.
    strong.suspend()
    assert strong.get("run", command="echo awake") == "awake\n"


def test_limits(guest):
    files = next(line for line in guest.get("read", path="/proc/self/limits").splitlines() if line.startswith("Max open files"))
    assert files.split()[3:5] == ["1024", "1048576"]
    assert guest.get("run", command="df -m /dev/shm | tail -1").split()[1] == "64"


def test_an_app_reaches_what_is_open(guest, outside):
    assert guest.get("at_start") == {"said": "echo: from the build"}, "already while its image was built"
    assert guest.get("fetch", host=OPEN, port=outside.port, say="hello") == "echo: hello"
    long = "x" * 500_000
    answer = guest.get("fetch", host=OPEN, port=outside.port, say=long[:3000])
    assert answer.replace("echo: ", "") == long[:3000]


def test_names_are_asked_of_the_node(guest, outside):
    assert guest.get("read", path="/etc/resolv.conf") == "nameserver 169.254.53.53\n"
    assert guest.get("lookup", name="shop.example") == [OPEN]
    assert guest.get("fetch", host="shop.example", port=outside.port, say="by name") == "echo: by name"
    assert guest.ask("lookup", name="nowhere.example")["error"] == "gaierror"


def test_nothing_of_the_host_is_reached(guest, place):
    edge, api, admin = place.edge_port, place.api.rsplit(":", 1)[1], place.admin.rsplit(":", 1)[1]
    with Echo(CLOSED) as closed, Echo("0.0.0.0") as everywhere:
        for host, port in [(CLOSED, closed.port), ("10.0.2.2", everywhere.port), ("169.254.169.254", "80"), (own_address(), everywhere.port)]:
            answer = guest.ask("fetch", host=host, port=port, say="anybody?")
            assert answer.get("errno") in CUT, f"{host}:{port}: {answer}"
        # 127.0.0.1 is the guest's own, where nobody listens on these.
        for port in (edge, api, admin, everywhere.port):
            assert guest.ask("fetch", host="127.0.0.1", port=port, say="anybody?")["error"] == "ConnectionRefusedError"
        assert closed.heard + everywhere.heard == []


def own_address():
    """An address of this host that is not loopback, or one that is private."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return "192.168.1.1"


def test_a_refused_port_is_a_reset(guest):
    with socket.socket() as unused:
        unused.bind((OPEN, 0))
        assert guest.ask("fetch", host=OPEN, port=str(unused.getsockname()[1]), say="hello")["errno"] in CUT


def test_connections_end_with_a_sleep_and_new_ones_work(guest, outside):
    guest.get("hold", host=OPEN, port=outside.port)
    assert guest.get("say", text="one") == "echo: one"
    guest.suspend()
    answer = guest.ask("say", text="two")
    assert answer.get("errno") in CUT, f"an outbound connection of before the sleep: {answer}"
    assert guest.get("fetch", host=OPEN, port=outside.port, say="after") == "echo: after"


def test_the_outside_wakes_nobody(guest, place):
    """A host that goes on sending to a microVM that has fallen asleep."""
    stop = threading.Event()
    with socket.create_server((OPEN, 0)) as server:
        def chat():
            connection, _ = server.accept()
            with connection:
                while not stop.wait(0.02):
                    try:
                        connection.sendall(b"still there? " * 100)
                    except OSError:
                        return

        chatter = threading.Thread(target=chat, daemon=True)
        chatter.start()
        guest.get("hold", host=OPEN, port=str(server.getsockname()[1]))
        woken = place.wakes()
        guest.suspend()
        # The chatter ends when its connection does.
        eventually("the connection to end", lambda: not chatter.is_alive(), within=60)
        stop.set()
        assert (guest.state, place.wakes()) == ("SUSPENDED", woken)
    guest.resume()


def test_no_egress_is_no_network(strong, run_guest, image, place, outside):
    assert "OSError(101" in strong.get("at_start")["error"], "not even while its image was built"
    assert strong.ask("fetch", host=OPEN, port=outside.port, say="hello")["errno"] == 101
    # And one of an image that had a network.
    vm = run_guest(image, egressNetworkConnectors=[connector(place, "NO_EGRESS")])
    assert vm.view()["egressNetworkConnectors"] == [connector(place, "NO_EGRESS")]
    before = len(outside.heard)
    assert vm.ask("fetch", host=OPEN, port=outside.port, say="hello")["errno"] == 101
    vm.suspend()
    assert vm.ask("fetch", host=OPEN, port=outside.port, say="hello")["errno"] == 101
    assert len(outside.heard) == before


@pytest.fixture
def run_guest(place):
    started = []

    def run(image, **request):
        started.append(Guest.run(place, image, **request))
        return started[-1]

    yield run
    for vm in started:
        place.client().terminate_microvm(microvmIdentifier=vm.id)


METADATA = "http://169.254.169.254/latest"
CREDENTIALS = f"{METADATA}/meta-data/iam/security-credentials/"


def curl(guest, arguments):
    return guest.get("run", command=f"curl -sS -m 20 -w ' %{{http_code}}' {arguments}").rsplit(" ", 1)


def metadata_token(guest):
    token, status = curl(guest, f"-X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 600' {METADATA}/api/token")
    assert status == "200", token
    return f"-H 'X-aws-ec2-metadata-token: {token}'"


@pytest.mark.parametrize("egress", ["INTERNET_EGRESS", "NO_EGRESS"])
def test_a_role_has_credentials_that_are_new_with_each_wake(run_guest, image, place, run_dir, egress):
    write_roles(run_dir, "first")
    vm = run_guest(image, executionRoleArn=ROLE, egressNetworkConnectors=[connector(place, egress)])
    token = metadata_token(vm)
    assert curl(vm, CREDENTIALS) == ["", "401"], "not without a token"
    assert curl(vm, f"{token} {CREDENTIALS}") == ["execution_role", "200"]
    credentials = json.loads(curl(vm, f"{token} {CREDENTIALS}execution_role")[0])
    assert (credentials["Code"], credentials["AccessKeyId"], credentials["SecretAccessKey"], credentials["Token"]) == ("Success", "AKIDEXAMPLE", "first", "session")
    ahead = datetime.datetime.fromisoformat(credentials["Expiration"]) - datetime.datetime.now(datetime.timezone.utc)
    assert datetime.timedelta(minutes=50) < ahead <= datetime.timedelta(minutes=56)
    write_roles(run_dir, "second")
    vm.suspend()
    assert json.loads(curl(vm, f"{metadata_token(vm)} {CREDENTIALS}execution_role")[0])["SecretAccessKey"] == "second"
    said = place.log.read_bytes() + place.admin_get("/metrics")[1].encode()
    assert b"AKIDEXAMPLE" not in said, "credentials are in the node's log or metrics"


def test_a_role_has_new_credentials_while_its_microvm_runs(run_guest, image, place, run_dir):
    write_roles(run_dir, "old")
    vm = run_guest(image, executionRoleArn=ROLE)
    token = metadata_token(vm)

    def secret():
        body, status = curl(vm, f"{token} {CREDENTIALS}execution_role")
        return json.loads(body)["SecretAccessKey"] if status == "200" else status

    assert secret() == "old"
    write_roles(run_dir, "new")
    eventually("the guest to have the new credentials", lambda: secret() == "new", within=60, every=0.5)
    place.kill()
    write_roles(run_dir, "newest")
    place.start()
    eventually("an adopted guest to have them as well", lambda: secret() == "newest", within=60, every=0.5)
    (run_dir / "roles").write_text("")
    eventually("what is taken away to be gone", lambda: secret() == "404", within=60, every=0.5)


def test_without_credentials_there_are_none(run_guest, guest, image):
    nobody = run_guest(image, executionRoleArn="arn:aws:iam::000000000000:role/unknown")
    assert curl(nobody, f"{metadata_token(nobody)} {CREDENTIALS}") == ["", "404"], "a role that the operator has given none"
    assert guest.ask("fetch", host="169.254.169.254", port="80", say="anybody?")["errno"] in CUT, "no role at all"


def test_an_adopted_microvm_has_its_network(guest, place, outside):
    """After a restart of the node, whose microVMs go on meanwhile."""
    guest.get("fetch", host=OPEN, port=outside.port, say="before")
    place.kill()
    place.start()
    assert guest.get("fetch", host=OPEN, port=outside.port, say="after the restart") == "echo: after the restart"


def test_what_no_network_can_be(place, image):
    with pytest.raises(botocore.exceptions.ClientError, match="Unrecognized managed network connector ARN"):
        Guest.run(place, image, wait=False, egressNetworkConnectors=[connector(place, "SOME_EGRESS")])
