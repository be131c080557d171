"""Tokens in other hands: five JWE libraries that have nothing in common read what the node mints, and the edge lets in what
they write under the node's key.

They write the protected header as they do by nature: three keep the order of members they are given, python-jose and
latchset's jose sort them. Both are headers that the node knows.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import joserfc.jwe
import joserfc.jwk
import jose.jwe
import jwcrypto.jwe
import jwcrypto.jwk
import pytest

from harness import clients
from harness.forge import Forger, decode, encode

NODE_SCRIPT = Path(__file__).parent / "javascript" / "jwe.js"


def run(command, text):
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}: {done.stderr}"
    return done.stdout


def oct_key(key):
    return {"kty": "oct", "k": encode(key)}


class Jwcrypto:
    """Python, over cryptography."""

    def read(self, token, key):
        sealed = jwcrypto.jwe.JWE(algs=["dir", "A256GCM"])
        sealed.deserialize(token, jwcrypto.jwk.JWK(**oct_key(key)))
        return sealed.payload

    def write(self, header, plain, key):
        sealed = jwcrypto.jwe.JWE(plain, json.dumps(header, separators=(",", ":")), algs=["dir", "A256GCM"])
        sealed.add_recipient(jwcrypto.jwk.JWK(**oct_key(key)))
        return sealed.serialize(compact=True)


class Joserfc:
    """Python, Authlib's successor."""

    algorithms = ["dir", "A256GCM"]

    def read(self, token, key):
        return joserfc.jwe.decrypt_compact(token, joserfc.jwk.OctKey.import_key(oct_key(key)), algorithms=self.algorithms).plaintext

    def write(self, header, plain, key):
        return joserfc.jwe.encrypt_compact(header, plain, joserfc.jwk.OctKey.import_key(oct_key(key)), algorithms=self.algorithms)


class PythonJose:
    """Python; sorts the members of the header."""

    def read(self, token, key):
        return jose.jwe.decrypt(token, key)

    def write(self, header, plain, key):
        return jose.jwe.encrypt(plain, key, algorithm=header["alg"], encryption=header["enc"], kid=header["kid"]).decode()


class JavaScriptJose:
    """panva's jose in Node.js, over WebCrypto."""

    node = Path(sys.executable).parent / "node"

    def read(self, token, key):
        return run([self.node, NODE_SCRIPT], json.dumps({"key": encode(key), "token": token})).encode()

    def write(self, header, plain, key):
        return run([self.node, NODE_SCRIPT], json.dumps({"key": encode(key), "header": header, "plaintext": plain.decode()}))


class LatchsetJose:
    """C, Debian's command `jose`; sorts the members of the header."""

    def __init__(self, directory):
        self.directory = directory

    def file(self, content):
        path = self.directory / "jose.in"
        path.write_bytes(content)
        return path

    def read(self, token, key):
        return run(["jose", "jwe", "dec", "-i", self.file(token.encode()), "-k", "-"], json.dumps(oct_key(key))).encode()

    def write(self, header, plain, key):
        sealed = ["jose", "jwe", "enc", "-i", json.dumps({"protected": header}), "-I", self.file(plain), "-k", "-", "-c"]
        return run(sealed, json.dumps(oct_key(key))).strip()


@pytest.fixture(params=[Jwcrypto, Joserfc, PythonJose, JavaScriptJose, LatchsetJose], ids=lambda library: library.__name__)
def library(request, tmp_path):
    return request.param(tmp_path) if request.param is LatchsetJose else request.param()


def test_it_reads_what_the_node_mints(kitchen, library):
    token = kitchen.token(8080)
    forger = Forger(kitchen.node, token)
    claims = json.loads(library.read(token, forger.key))
    assert claims == forger.claims
    assert claims["sub"] == kitchen.id and claims["ports"] == {"ranges": [[8080, 8080]]} and claims["exp"] - claims["iat"] == 15 * 60


def test_the_edge_takes_what_it_writes_and_no_more(kitchen, library):
    forger = Forger(kitchen.node, kitchen.token(8080))
    now = int(time.time())
    plain = json.dumps(forger.claims | {"iat": now, "exp": now + 60}).encode()
    token = library.write(forger.header, plain, forger.key)
    kitchen.node.minted.append(token)
    assert json.loads(decode(token.split(".")[0])) == forger.header
    stale = library.write(forger.header, json.dumps(forger.claims | {"iat": now - 60, "exp": now}).encode(), forger.key)
    other = library.write(forger.header, plain, bytes(32))
    with httpx.Client(base_url=kitchen.url, verify=clients.tls(kitchen.node), trust_env=False, timeout=120) as client:
        answers = [client.get("/headers", headers={"X-aws-proxy-auth": text}) for text in (token, stale, other)]
    assert [answer.status_code for answer in answers] == [200, 403, 403], [answer.text for answer in answers]
    assert [answer.headers.get("x-dormouse-reason") for answer in answers[1:]] == ["token-expired", "token-refused"]
