"""Fixtures: one node for the whole run, three images that are built when the first test needs them, microVMs to share.

The tests need $DORMOUSE_BIN and the clients of requirements.txt; `make test-system` has both. `DORMOUSE_KEEP=1` keeps the
data directory of the run for a look afterwards.
"""
import datetime
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from harness import clients, images
from harness.microvm import PATIENT, Microvm
from harness.node import Node, binary, live

HERE = Path(__file__).parent

clients.loopback_for_localhost()
# A shell lets what it starts in the background ignore Ctrl-C, and every program that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def run_dir():
    """Everything that the run writes. Not pytest's own tmp_path: guest disks are sparse files of gigabytes, and the three
    last runs are more than anybody wants to keep."""
    path = Path(tempfile.mkdtemp(prefix="dormouse-tests-", dir=os.environ.get("DORMOUSE_TMP")))
    yield path
    if os.environ.get("DORMOUSE_KEEP"):
        print(f"\nkept: {path}")
    else:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def node(run_dir):
    """The node. When the run ends it must stop in order and leave neither a process nor a token in its log."""
    with Node(run_dir / "node") as node:
        yield node


@pytest.fixture(scope="session")
def wheels(run_dir):
    return images.grpc_wheels(run_dir)


def self_signed():
    """A certificate that nobody outside trusts, as an app in a guest has one: its files by name."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "inside.example")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=30))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return {"certificate.pem": certificate.public_bytes(pem), "key.pem": private}


@pytest.fixture(scope="session")
def hello_image(node):
    """The article's app, as the article has it."""
    return images.build(node, "hello-microvm-test", images.zip_of(images.ARTICLE_APP))


@pytest.fixture(scope="session")
def kitchen_image(node):
    """apps/kitchen_sink: one path per thing that a gateway or a sleep could break."""
    return images.build(node, "kitchen-sink", images.app("kitchen_sink"))


@pytest.fixture(scope="session")
def grpc_image(node, wheels, run_dir):
    """apps/grpc_echo: one gRPC method of every kind, and a web app of HTTP/1.1, HTTP/2 and WebSocket; all also over TLS."""
    web = images.wheels(run_dir / "web", "hypercorn==0.18.0")
    return images.build(node, "grpc-echo", images.zip_of(HERE / "apps" / "grpc_echo", wheels, web, **self_signed()))


@pytest.fixture(scope="session")
def polyglot(node, grpc_image):
    """A running microVM with that app, shared."""
    return Microvm.run(node, grpc_image)


@pytest.fixture
def run(node):
    """Runs a microVM for one test, which ends with it."""
    started = []

    def run_one(image, **request):
        vm = Microvm.run(node, image, **request)
        started.append(vm)
        return vm

    yield run_one
    if node.runs:
        for vm in started:
            node.client().terminate_microvm(microvmIdentifier=vm.id)


@pytest.fixture(scope="session")
def kitchen(node, kitchen_image):
    """A running microVM with the kitchen sink app, shared by tests that only talk to it."""
    return Microvm.run(node, kitchen_image)


@pytest.fixture(scope="session")
def other(node, kitchen_image):
    """A second one: the neighbour whose tokens and names must not work here."""
    return Microvm.run(node, kitchen_image)


@pytest.fixture(scope="session")
def shared_sleeper(node, kitchen_image):
    return Microvm.run(node, kitchen_image, idle=PATIENT).suspend()


@pytest.fixture
def sleeper(node, shared_sleeper):
    """A sleeping microVM that a refused request must not wake: checked after the test, by its state and by the node's own
    counter of wakes."""
    if shared_sleeper.state != "SUSPENDED":
        shared_sleeper.suspend()
    before = node.wakes()
    yield shared_sleeper
    assert shared_sleeper.state == "SUSPENDED", f"a refused request woke {shared_sleeper.id}: it is {shared_sleeper.state}"
    assert node.wakes() == before, f"a refused request caused {node.wakes() - before:g} wake(s)"


def pytest_configure(config):
    try:
        binary()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test shows what the nodes said."""
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        for node in live:
            report.sections.append((f"last lines of {node.log}", node.log_tail()))


def pytest_addoption(parser):
    parser.addoption("--kills", choices=["some", "all"], default="some", help="how many of all steps test_kills.py kills the node at")
