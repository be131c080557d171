"""What a running node reads again: certificate, token keys, access keys, limits; by itself when a file changes, and on SIGHUP.

A node of its own, because these tests change its files. The refusals that they ask for need no microVM; one holds a token.
"""
import base64
import contextlib
import datetime
import json
import os
import signal
import socket
import time
import uuid

import boto3
import httpx
import pytest
from botocore.exceptions import ClientError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from harness import clients, images
from harness.microvm import Microvm
from harness.node import Node
from harness.waiting import eventually

NOTICED_WITHIN = 20


@pytest.fixture(scope="module")
def fourth(run_dir):
    with Node(run_dir / "fourth") as node:
        yield node


@pytest.fixture(scope="module")
def vm(fourth):
    return Microvm.run(fourth, images.build(fourth, "hello-microvm-test", images.zip_of(images.ARTICLE_APP)))


def reloads(node, what, outcome="done"):
    return node.metrics().total("node_reloads_total", what=what, outcome=outcome)


@contextlib.contextmanager
def counted(node, what, outcome="done"):
    """What is done inside makes the node read `what` once more."""
    before = reloads(node, what, outcome)
    yield
    eventually(f"a reload of {what} to be {outcome}", lambda: reloads(node, what, outcome) == before + 1, within=NOTICED_WITHIN)


def put(path, text, mode=0o600):
    """Replaces a file as a careful program does: whole, by a rename."""
    fresh = path.with_name(f".{path.name}.fresh")
    fresh.write_text(text)
    fresh.chmod(mode)
    os.replace(fresh, path)


def shown(node):
    """The certificate that a new connection is shown."""
    with socket.create_connection(("127.0.0.1", node.edge_port), timeout=10) as plain:
        with clients.tls(node).wrap_socket(plain, server_hostname="any.microvm.localhost") as tls:
            return tls.getpeercert(binary_form=True)


def fresh_pair(node, serial):
    """A certificate of the node's own authority, and its key, PEM."""
    authority = x509.load_pem_x509_certificate(node.ca.read_bytes())
    authority_key = serialization.load_pem_private_key((node.data_dir / "tls" / "ca.key").read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "*.microvm.localhost")]))
        .issuer_name(authority.subject).public_key(key.public_key()).serial_number(serial)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=90))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("*.microvm.localhost")]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
            authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(pem).decode(), private.decode()


def serial(certificate):
    return x509.load_der_x509_certificate(certificate).serial_number


def test_a_new_certificate_is_shown_and_a_bad_one_is_not(fourth):
    tls = fourth.data_dir / "tls"
    with httpx.Client(verify=clients.tls(fourth), trust_env=False) as client:
        url = f"https://any.microvm.localhost:{fourth.edge_port}/"
        assert client.get(url).status_code == 403
        certificate, key = fresh_pair(fourth, 4711)
        with counted(fourth, "certificate"):
            put(tls / "edge.pem", certificate, 0o644)
            put(tls / "edge.key", key)
        assert serial(shown(fourth)) == 4711
        # Without its key; then not a certificate at all. Each is told of once, and the pair before them stays.
        other, other_key = fresh_pair(fourth, 4712)
        for bad in (other, "this is no certificate"):
            with counted(fourth, "certificate", "failed"):
                put(tls / "edge.pem", bad, 0o644)
            assert serial(shown(fourth)) == 4711
        assert "could not be read again; what was in force before stays in force" in fourth.log.read_text()
        with counted(fourth, "certificate"):
            put(tls / "edge.pem", other, 0o644)
            put(tls / "edge.key", other_key)
        assert serial(shown(fourth)) == 4712
        assert client.get(url).status_code == 403, "the connection from before goes on"


def test_token_keys_are_rotated_without_a_restart(fourth, vm):
    """As `rotate` of the key ring does it: a new key first, the old one opens for an hour."""
    path = fourth.data_dir / "token-keys.json"
    before = vm.token()
    ring = json.loads(path.read_text())
    now = int(time.time())
    for key in ring["keys"]:
        key["opens_until"] = key["opens_until"] or now + 3600
    fresh = str(uuid.uuid4())
    secret = base64.urlsafe_b64encode(os.urandom(32)).rstrip(b"=").decode()
    ring["keys"].insert(0, {"kid": fresh, "k": secret, "created_at": now, "opens_until": None})
    with counted(fourth, "token-keys"):
        put(path, json.dumps(ring))
    after = vm.token()
    header = json.loads(base64.urlsafe_b64decode(after.split(".")[0] + "=="))
    assert header["kid"] == fresh, header
    for token in (before, after):
        assert vm.curl("--header", f"X-aws-proxy-auth: {token}").status == 200
    with counted(fourth, "token-keys", "failed"):
        put(path, "{}")
    for token in (before, after):
        assert vm.curl("--header", f"X-aws-proxy-auth: {token}").status == 200, "a bad file changes nothing"
    with counted(fourth, "token-keys"):
        put(path, json.dumps(ring))


def test_sighup_reads_everything_and_a_fault_in_one_stops_nothing_else(fourth, vm):
    """A node whose token keys are damaged still gets its new access keys."""
    ring, credentials = fourth.data_dir / "token-keys.json", fourth.data_dir / "credentials"
    good, known = ring.read_text(), credentials.read_text()
    before = {what: reloads(fourth, what) for what in ("certificate", "access-keys", "limits")}
    failed = reloads(fourth, "token-keys", "failed")
    put(ring, "{}")
    settings = fourth.config.read_text()
    put(fourth.config, settings + '\n[[api.keys]]\nid = "AKIAABCDEFGHIJKLMNOP"\nrole = "operator"\n')
    put(credentials, known + "\n[second]\naws_access_key_id = AKIAABCDEFGHIJKLMNOP\naws_secret_access_key = 0123456789012345678901234567890123456789\n")
    fourth.process.send_signal(signal.SIGHUP)
    eventually("the rest to be read", lambda: all(reloads(fourth, what) > count for what, count in before.items()), within=NOTICED_WITHIN)
    eventually("the fault to be counted", lambda: reloads(fourth, "token-keys", "failed") > failed, within=NOTICED_WITHIN)
    second = boto3.session.Session("AKIAABCDEFGHIJKLMNOP", "0123456789012345678901234567890123456789")
    client = second.client("lambda-microvms", endpoint_url=f"http://{fourth.api}", region_name="us-east-1")
    assert client.get_microvm(microvmIdentifier=vm.id)["state"] == "RUNNING"
    # Without its entry in the configuration it may do nothing, and one with an entry that is wrong keeps what it had.
    with counted(fourth, "access-keys", "failed"):
        put(fourth.config, settings + '\n[[api.keys]]\nid = "AKIAABCDEFGHIJKLMNOP"\nrole = "root"\n')
    assert client.get_microvm(microvmIdentifier=vm.id)["state"] == "RUNNING"
    with counted(fourth, "access-keys"):
        put(fourth.config, settings)
    with pytest.raises(ClientError) as refused:
        client.get_microvm(microvmIdentifier=vm.id)
    assert refused.value.response["Error"]["Code"] == "AccessDeniedException" and "user/second is not authorized" in str(refused.value)
    with counted(fourth, "token-keys"):
        put(ring, good)
    # What was taken out is refused from then on.
    with counted(fourth, "access-keys"):
        put(credentials, known)
    with pytest.raises(ClientError) as refused:
        client.get_microvm(microvmIdentifier=vm.id)
    assert refused.value.response["Error"]["Code"] == "UnrecognizedClientException"


def test_limits_are_replaced_and_bad_ones_are_not(fourth, vm):
    settings = fourth.config.read_text()
    limited = settings.replace("[edge]\n", "[edge]\nmax_body_bytes = 1000\n")
    with vm.http() as client:
        post = lambda: client.post("/", content=b"x" * 2000)
        assert post().status_code != 413
        with counted(fourth, "limits"):
            put(fourth.config, limited)
        answer = post()
        assert (answer.status_code, answer.headers["x-dormouse-reason"]) == (413, "body-too-large")
        with counted(fourth, "limits", "failed"):
            put(fourth.config, settings.replace("[edge]\n", "[edge]\nmax_body_bites = 5\n"))
        assert "max_body_bytes" in fourth.log.read_text(), "it says what was meant"
        assert post().status_code == 413, "what was in force stays in force"
        # Other settings wait for the next start, and the operator is told.
        with counted(fourth, "limits"):
            put(fourth.config, settings.replace("[lifecycle]\n", "[lifecycle]\nmax_microvms = 77\n"))
        assert "take effect at the next start or upgrade" in fourth.log.read_text()
        assert post().status_code != 413
        with counted(fourth, "limits"):
            put(fourth.config, settings)
