"""Who may talk to a microVM: cases 1 to 18 of the project's list, over the clients people have.

"Refused" means: answered before any guest is touched. Every test here that takes `sleeper` aims at a sleeping microVM, and
the fixture then checks that it still sleeps and that the node counted no wake.
"""
import base64
import json
import os
import threading
import time

import httpx
import pytest
from jwcrypto import jwe, jwk, jws, jwt
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect as websocket

from harness import clients
from harness.forge import Forger, decode, encode
from harness.leaks import Tokens
from harness.microvm import ALL_PORTS
from harness.waiting import eventually

MISSING = "Request missing authentication"
FAILED = "Token authentication failed"
PORT_DENIED = "Access to port denied"


def by_curl_h1(vm, headers, path="/"):
    return vm.curl("--http1.1", *headed(headers), path=path)


def by_curl_h2(vm, headers, path="/"):
    answer = vm.curl("--http2", *headed(headers), path=path)
    assert answer.version == "HTTP/2", f"curl asked for HTTP/2 and got {answer.version}"
    return answer


def by_httpx(vm, headers, path="/"):
    with httpx.Client(verify=clients.tls(vm.node), trust_env=False, timeout=120) as client:
        answer = client.get(vm.url + path, headers=headers)
    return clients.Answer(answer.status_code, dict(answer.headers), answer.content, answer.http_version)


def headed(headers):
    return [part for name, value in headers.items() for part in ("--header", f"{name}: {value}" if value else f"{name};")]


CLIENTS = [pytest.param(by_curl_h1, id="curl-h1"), pytest.param(by_curl_h2, id="curl-h2"), pytest.param(by_httpx, id="httpx")]


def refused(answer, status, body):
    """The status and the body that AWS's clients match on, and what goes with them."""
    assert (answer.status, answer.text) == (status, body), f"expected {status} {body!r}, got {answer}"
    assert answer.headers.get("x-amzn-requestid"), f"a refusal carries x-amzn-requestid: {answer}"
    assert answer.headers.get("x-dormouse-reason"), f"a refusal of ours says why in x-dormouse-reason: {answer}"
    assert answer.headers.get("cache-control") == "private, no-store", f"no cache may keep a refusal: {answer}"


def auth(token, port=None):
    return {"X-aws-proxy-auth": token} | ({"X-aws-proxy-port": str(port)} if port is not None else {})


@pytest.fixture(scope="module")
def forger(node, shared_sleeper):
    """Holds the key of the node and the claims of a genuine token for 8080 of the sleeping microVM."""
    return Forger(node, shared_sleeper.token(8080))


# -- 1: no token ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
def test_case_1_without_a_token_nobody_gets_in_and_nobody_wakes(sleeper, client):
    refused(client(sleeper, {}), 403, MISSING)


def test_case_1_a_preflight_has_no_token_and_gets_the_same(sleeper):
    answer = sleeper.curl("--request", "OPTIONS", "--header", "Origin: https://example.com", "--header", "Access-Control-Request-Method: GET")
    refused(answer, 403, MISSING)


# -- 2: not parseable -------------------------------------------------------------------------------------------------

UNREADABLE = {
    "empty": b"",
    "one word": b"letmein",
    "four parts": b"a.b.c.d",
    "six parts": b"a.b.c.d.e.f",
    "five empty parts": b"....",
    "not base64url": b"eyJ!.x.x.x.x",
    "blank inside": b"a.b. c.d.e",
    "tab inside": b"a.b.\tc.d.e",
    "not ASCII": "é.b.c.d.e".encode(),
    "Latin-1": b"\xe9.b.c.d.e",
    "a scheme word": b"Bearer a.b.c.d.e",
    "only dots and text": b"...." + b"x" * 3000,
}


@pytest.mark.parametrize("token", [pytest.param(value, id=name) for name, value in UNREADABLE.items()])
def test_case_2_what_cannot_be_a_token_is_as_good_as_none(sleeper, token):
    answer = clients.raw_get(sleeper.node, sleeper.host, [b"X-aws-proxy-auth: " + token])
    refused(answer, 403, MISSING)


@pytest.mark.parametrize("change", ["padding", "standard alphabet", "a part twice", "blank inside"])
def test_case_2_a_genuine_token_spelled_otherwise_is_not_read(sleeper, change):
    parts = sleeper.token().split(".")
    if change == "padding":
        parts = [part + "=" for part in parts]
    elif change == "standard alphabet":
        parts = [part.replace("-", "+").replace("_", "/") + ("" if "-" in part or "_" in part else "+") for part in parts]
    elif change == "a part twice":
        parts.append(parts[-1])
    elif change == "blank inside":
        parts[3] = parts[3][:10] + " " + parts[3][10:]
    answer = clients.raw_get(sleeper.node, sleeper.host, [b"X-aws-proxy-auth: " + ".".join(parts).encode()])
    refused(answer, 403, MISSING)


@pytest.mark.parametrize("kept", [0, 11, 16, 21])
def test_case_14_a_genuine_token_with_less_of_its_tag_is_refused_like_any_other(sleeper, kept):
    parts = sleeper.token().split(".")
    parts[-1] = parts[-1][:kept]
    refused(clients.raw_get(sleeper.node, sleeper.host, [b"X-aws-proxy-auth: " + ".".join(parts).encode()]), 403, FAILED)


# -- 3: somebody else's token -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
def test_case_3_the_token_of_a_neighbour_opens_nothing(sleeper, other, client):
    refused(client(sleeper, auth(other.token())), 403, FAILED)


def test_case_3_a_sleeping_neighbour_is_not_woken_by_a_token_shown_elsewhere(sleeper, other):
    refused(by_curl_h2(other, auth(sleeper.token())), 403, FAILED)


@pytest.mark.parametrize("spelling", ["prefix", "longer", "upper case", "ARN", "without its prefix", "empty", "number", "list"])
def test_case_3_an_id_that_is_nearly_right_is_wrong(sleeper, forger, spelling):
    """Sealed with the node's own key: even the node could not mint these by mistake and have them work."""
    name = claim_holding(forger, sleeper.id)
    value = {
        "prefix": sleeper.id[:-1], "longer": sleeper.id + "0", "upper case": sleeper.id.upper(),
        "ARN": f"arn:aws:lambda:us-east-1:000000000000:microvm:{sleeper.id}", "without its prefix": sleeper.id.removeprefix("microvm-"),
        "empty": "", "number": 1, "list": [sleeper.id],
    }[spelling]
    refused(by_httpx(sleeper, auth(forger.with_claims(**{name: value}))), 403, FAILED)


def claim_holding(forger, value):
    names = [name for name, held in forger.claims.items() if held == value]
    assert len(names) == 1, f"exactly one claim should hold {value}; the claims are {sorted(forger.claims)}"
    return names[0]


# -- 4: hosts of no microVM -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["none", "of another microVM"])
def test_case_4_a_host_of_no_microvm_looks_like_any_other_host(node, kitchen, token):
    unknown = "0b5e55ed-0000-4000-8000-000000000000"
    headers = [] if token == "none" else [f"X-aws-proxy-auth: {kitchen.token()}"]
    authority = f"{unknown}.{kitchen.host.split('.', 1)[1]}"
    answer = clients.raw_get(node, authority, headers)
    refused(answer, 403, MISSING if token == "none" else FAILED)
    there = clients.raw_get(node, kitchen.host, [] if token == "none" else ["X-aws-proxy-auth: " + forged_for_nobody(kitchen)])
    # The reason that a stranger reads may tell what is wrong with the token, and never whether the host exists.
    assert (there.status, there.text) == (answer.status, answer.text)


def forged_for_nobody(vm):
    """A token of the right form under a key that the node has never had."""
    genuine = vm.token().split(".")
    return ".".join([genuine[0], "", encode(os.urandom(12)), encode(os.urandom(len(decode(genuine[3])))), encode(os.urandom(16))])


def test_case_4_a_terminated_microvm_tells_its_owner_502_and_others_nothing(run, kitchen_image, other):
    vm = run(kitchen_image)
    token = vm.token()
    vm.terminate()
    mine = by_curl_h1(vm, auth(token))
    assert (mine.status, mine.text) == (502, ""), f"its owner gets an empty 502: {mine}"
    refused(by_curl_h1(vm, {}), 403, MISSING)
    refused(by_curl_h1(vm, auth(other.token())), 403, FAILED)


# -- 5 and 6: port scope ----------------------------------------------------------------------------------------------

SCOPES = [
    # (ports of the token, port asked for, let in)
    ((8080,), 8080, True),
    ((8080,), 9000, False),
    ((8080,), 8079, False),
    ((8080,), 8081, False),
    ((9000,), 9000, True),
    ((3000, 9000), 9000, True),
    ((3000, 9000), 8080, False),
    (((8080, 9000),), 8080, True),
    (((8080, 9000),), 9000, True),
    (((8080, 9000),), 8079, False),
    (((8080, 9000),), 9001, False),
    (((8081, 8999),), 8080, False),
    (((8081, 8999),), 9000, False),
    ((ALL_PORTS,), 9000, True),
]


@pytest.mark.parametrize("ports, asked, let_in", SCOPES, ids=[f"{ports}-asks-{asked}" for ports, asked, _ in SCOPES])
def test_case_5_a_token_opens_its_ports_and_no_other(kitchen, ports, asked, let_in):
    answer = by_httpx(kitchen, auth(kitchen.token(*ports), asked))
    if let_in:
        assert answer.status == 200, f"port {asked} is in the scope {ports}: {answer}"
    else:
        refused(answer, 403, PORT_DENIED)


@pytest.mark.parametrize("client", CLIENTS)
def test_case_5_a_port_outside_the_scope_wakes_nobody(sleeper, client):
    refused(client(sleeper, auth(sleeper.token(8080), 9000)), 403, PORT_DENIED)


def test_case_5_the_port_of_a_subprotocol_is_held_to_the_scope_too(sleeper):
    token = sleeper.token(8080)
    answer = upgrade(sleeper, f"lambda-microvms, lambda-microvms.authentication.{token}, lambda-microvms.port.9000")
    refused(answer, 403, PORT_DENIED)


def test_case_5_the_header_goes_before_the_subprotocol(sleeper):
    token = sleeper.token(8080)
    answer = upgrade(sleeper, f"lambda-microvms, lambda-microvms.authentication.{token}, lambda-microvms.port.8080", "X-aws-proxy-port: 9000")
    refused(answer, 403, PORT_DENIED)


def upgrade(vm, subprotocols, *more):
    key = base64.b64encode(os.urandom(16)).decode()
    return clients.raw_get(vm.node, vm.host, [
        "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", f"Sec-WebSocket-Key: {key}",
        f"Sec-WebSocket-Protocol: {subprotocols}", *more,
    ], path="/ws")


def test_case_6_without_a_port_8080_is_meant(kitchen, sleeper):
    assert by_curl_h2(kitchen, auth(kitchen.token(8080))).status == 200
    refused(by_curl_h2(sleeper, auth(sleeper.token(9000))), 403, PORT_DENIED)


def test_case_6_nobody_listening_is_502_and_not_403(kitchen):
    answer = by_curl_h1(kitchen, auth(kitchen.token(7777), 7777))
    assert (answer.status, answer.text) == (502, ""), f"in scope, and nobody listens: {answer}"
    assert answer.headers.get("x-dormouse-reason"), f"an empty 502 needs a reason: {answer}"


# -- 7: the text of a port --------------------------------------------------------------------------------------------

PORT_TEXTS = [
    b"0", b"65536", b"99999", b"123456", b"-1", b"+8080", b"08080", b"0x1f90", b"8080,9000", b"8080, 8080", b"8080;", b"8 080",
    b"8080@10.0.0.1", b"10.0.0.1:8080", b"http", b"8080.0", b"1e3", b"\xef\xbc\x98\xef\xbc\x90\xef\xbc\x98\xef\xbc\x90", b"",
]


@pytest.mark.parametrize("text", PORT_TEXTS, ids=[repr(text)[2:-1] or "empty" for text in PORT_TEXTS])
def test_case_7_what_is_not_a_port_is_a_bad_request(sleeper, text):
    answer = clients.raw_get(sleeper.node, sleeper.host, [f"X-aws-proxy-auth: {sleeper.token(ALL_PORTS)}", b"X-aws-proxy-port: " + text])
    assert answer.status == 400, f"a port header of {text!r}: {answer}"
    assert answer.headers.get("x-dormouse-reason"), f"which says why: {answer}"


def test_case_7_two_port_headers_are_one_too_many(sleeper):
    lines = [f"X-aws-proxy-auth: {sleeper.token(ALL_PORTS)}", "X-aws-proxy-port: 8080", "X-aws-proxy-port: 9000"]
    assert clients.raw_get(sleeper.node, sleeper.host, lines).status == 400


def test_case_7_a_bad_port_without_a_token_is_first_of_all_without_a_token(sleeper):
    assert clients.raw_get(sleeper.node, sleeper.host, ["X-aws-proxy-port: 0"]).status in (400, 403)


# -- 8 and 10: time ---------------------------------------------------------------------------------------------------


def times(now):
    """Claims about time that no token of ours has; exp and iat are seconds since the epoch."""
    return {
        "expired an hour ago": {"exp": now - 3600, "iat": now - 7200},
        "expires exactly now": {"exp": now, "iat": now - 60},
        "no exp": {"exp": None},
        "exp is text": {"exp": str(now + 600)},
        "exp is a float": {"exp": now + 600.5},
        "exp is negative": {"exp": -1},
        "exp is 2^63": {"exp": 2**63},
        "exp is 2^64": {"exp": 2**64},
        "exp is true": {"exp": True},
        "more than an hour": {"exp": now + 7200, "iat": now},
        "iat in the future": {"iat": now + 600, "exp": now + 1200},
        "nbf in the future": {"nbf": now + 600},
    }


@pytest.mark.parametrize("which", list(times(0)))
def test_cases_8_and_10_a_token_out_of_its_time_is_dead(sleeper, forger, which):
    answer = by_httpx(sleeper, auth(forger.with_claims(**times(int(time.time()))[which])))
    refused(answer, 403, FAILED)


def test_the_forger_can_make_good_tokens(kitchen):
    """Without this, the tests with forged tokens would also pass with a forger that gets everything wrong."""
    forger = Forger(kitchen.node, kitchen.token(8080))
    now = int(time.time())
    answer = by_httpx(kitchen, auth(forger.with_claims(iat=now, exp=now + 60)))
    assert answer.status == 200, f"a token sealed with the node's key and honest claims works: {answer}"


# -- 9: expiry while something runs -----------------------------------------------------------------------------------


def test_case_9_a_stream_outlives_its_token_and_the_next_request_does_not(kitchen):
    forger = Forger(kitchen.node, kitchen.token(8080))
    expires = int(time.time()) + 5
    token = forger.with_claims(iat=int(time.time()), exp=expires)
    with kitchen.http(http2=True, token=token) as client:
        with client.stream("GET", "/sse?every=0.2") as stream:
            assert stream.status_code == 200
            for line in stream.iter_lines():
                if line.startswith("data:") and json.loads(line[5:])["realtime"] > expires + 1:
                    break  # More than a second past the end of the token, and the stream still brings ticks.
            else:
                pytest.fail("the stream was cut when its token expired")
            # The same connection: httpx has one per host for HTTP/2.
            answer = client.get("/")
        assert (answer.status_code, answer.text) == (403, FAILED), f"every new request is checked again: {answer.status_code} {answer.text!r}"


def test_case_9_a_websocket_outlives_its_token_and_the_next_one_is_not_opened(kitchen):
    forger = Forger(kitchen.node, kitchen.token(8080))
    expires = int(time.time()) + 3
    headers = auth(forger.with_claims(iat=int(time.time()), exp=expires))

    def opened():
        return websocket(f"wss://{kitchen.endpoint}/ws", ssl=clients.tls(kitchen.node), additional_headers=headers, open_timeout=60, proxy=None)

    def is_refused():
        try:
            with opened():
                return None
        except InvalidStatus as refusal:
            return refusal.response

    with opened() as socket:
        answer = eventually("the token to expire", is_refused, within=60)
        assert (answer.status_code, answer.body) == (403, FAILED.encode())
        assert time.time() >= expires
        for text in ("still", "here"):
            socket.send(text)
            assert socket.recv(timeout=60) == text


def test_case_9_a_kept_connection_is_checked_for_every_request(kitchen):
    forger = Forger(kitchen.node, kitchen.token(8080))
    expires = int(time.time()) + 3
    short, long = forger.with_claims(iat=int(time.time()), exp=expires), kitchen.token(8080)
    with clients.Raw(kitchen.node, kitchen.host) as connection:
        def get(token):
            connection.send(f"GET / HTTP/1.1\r\nHost: {kitchen.endpoint}\r\nX-aws-proxy-auth: {token}\r\n\r\n".encode())
            return connection.answer()

        statuses = []

        def is_refused():
            answer = get(short)
            statuses.append(answer.status)
            return answer if answer.status != 200 else None

        refused(eventually("the token to expire", is_refused, within=60), 403, FAILED)
        assert statuses[0] == 200 and time.time() >= expires, f"it was good before, and often enough to be known: {statuses}"
        assert get(long).status == 200, "the connection itself goes on"


# -- 11: other algorithms ---------------------------------------------------------------------------------------------


def other_algorithms(forger):
    """Tokens of every other kind, with the claims of a genuine one; where the algorithm takes the node's key, with that."""
    claims = json.dumps(forger.claims).encode()
    kid = forger.header["kid"]
    oct_key = jwk.JWK(kty="oct", k=encode(forger.key), kid=kid)
    rsa = jwk.JWK.generate(kty="RSA", size=2048)
    ec = jwk.JWK.generate(kty="EC", crv="P-256")
    cek64 = jwk.JWK(kty="oct", k=encode(forger.key + forger.key))
    cek16 = jwk.JWK(kty="oct", k=encode(forger.key[:16]))

    def sealed(alg, enc, key, **more):
        token = jwe.JWE(claims, json.dumps({"kid": kid, "alg": alg, "enc": enc} | more), algs=[alg, enc])
        token.add_recipient(key)
        return token

    signed = jws.JWS(claims)
    signed.add_signature(oct_key, None, json.dumps({"alg": "HS256", "kid": kid}))
    nested = jwt.JWT(header={"alg": "HS256", "kid": kid}, claims=forger.claims)
    nested.make_signed_token(oct_key)
    none = encode(json.dumps({"alg": "none", "kid": kid}).encode())
    # A count of 2^31 iterations: jwcrypto would spend hours on it, and so would whoever tries to open it.
    pbes2 = encode(json.dumps({"alg": "PBES2-HS256+A128KW", "enc": "A256GCM", "kid": kid, "p2s": encode(os.urandom(16)), "p2c": 2**31}).encode())
    return {
        "none, three parts": f"{none}.{encode(claims)}.",
        "none, five parts": f"{none}..{encode(os.urandom(12))}.{encode(claims)}.{encode(os.urandom(16))}",
        "A256KW": sealed("A256KW", "A256GCM", oct_key).serialize(compact=True),
        "A256GCMKW": sealed("A256GCMKW", "A256GCM", oct_key).serialize(compact=True),
        "RSA1_5": sealed("RSA1_5", "A256GCM", rsa).serialize(compact=True),
        "RSA-OAEP": sealed("RSA-OAEP", "A256GCM", rsa).serialize(compact=True),
        "ECDH-ES": sealed("ECDH-ES", "A256GCM", ec).serialize(compact=True),
        "PBES2 with 2^31 rounds": f"{pbes2}.{encode(os.urandom(40))}.{encode(os.urandom(12))}.{encode(claims)}.{encode(os.urandom(16))}",
        "dir with A128GCM": sealed("dir", "A128GCM", cek16).serialize(compact=True),
        "dir with A256CBC-HS512": sealed("dir", "A256CBC-HS512", cek64).serialize(compact=True),
        "dir with A128CBC-HS256": sealed("dir", "A128CBC-HS256", oct_key).serialize(compact=True),
        "signed, not sealed": signed.serialize(compact=True),
        "signed inside sealed": forger.seal(plain=nested.serialize().encode()),
        "JSON serialisation": json.dumps(json.loads(sealed("dir", "A256GCM", oct_key).serialize())),
    }


ALGORITHMS = [
    "none, three parts", "none, five parts", "A256KW", "A256GCMKW", "RSA1_5", "RSA-OAEP", "ECDH-ES", "PBES2 with 2^31 rounds",
    "dir with A128GCM", "dir with A256CBC-HS512", "dir with A128CBC-HS256", "signed, not sealed", "signed inside sealed", "JSON serialisation",
]


@pytest.fixture(scope="module")
def algorithms(forger):
    made = other_algorithms(forger)
    assert sorted(made) == sorted(ALGORITHMS)
    return made


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_case_11_only_dir_with_a256gcm_is_read(sleeper, algorithms, algorithm):
    started = time.monotonic()
    answer = by_httpx(sleeper, auth(algorithms[algorithm]))
    assert answer.status == 403 and answer.text in (MISSING, FAILED), f"{algorithm}: {answer}"
    assert time.monotonic() - started < 5, f"refusing {algorithm} took {time.monotonic() - started:.1f} s: no key operation may depend on what the client asks for"


HEADERS = {
    "an unknown member": lambda header: header | {"typ": "JWT"},
    "crit": lambda header: header | {"crit": ["exp"], "exp": 1},
    "jku": lambda header: header | {"jku": "http://127.0.0.1:1/keys"},
    "jwk": lambda header: header | {"jwk": {"kty": "oct", "k": "AAAA"}},
    "no kid": lambda header: {name: value for name, value in header.items() if name != "kid"},
    "an unknown kid": lambda header: header | {"kid": "00000000-0000-4000-8000-000000000000"},
    "a path as kid": lambda header: header | {"kid": "../../etc/passwd"},
    "a huge kid": lambda header: header | {"kid": "k" * 3000},
}


@pytest.mark.parametrize("change", list(HEADERS))
def test_case_11_a_header_that_is_not_ours_is_refused(sleeper, forger, change):
    answer = by_httpx(sleeper, auth(forger.seal(header=HEADERS[change](forger.header))))
    assert answer.status == 403 and answer.text in (MISSING, FAILED), f"{change}: {answer}"


@pytest.mark.parametrize("size", [{"tag_bytes": 12}, {"tag_bytes": 8}, {"tag_bytes": 1}, {"iv_bytes": 8}, {"iv_bytes": 16}], ids=str)
def test_case_11_a_cut_tag_or_an_odd_iv_is_refused(sleeper, forger, size):
    """josekit alone would take a tag of one byte."""
    answer = by_httpx(sleeper, auth(forger.seal(**size)))
    assert answer.status == 403 and answer.text in (MISSING, FAILED), f"{size}: {answer}"


def test_case_11_another_key_is_no_key(sleeper, forger):
    refused(by_httpx(sleeper, auth(forger.seal(key=os.urandom(32)))), 403, FAILED)


@pytest.mark.parametrize("part", range(5))
def test_case_11_one_flipped_bit_anywhere_kills_a_token(sleeper, part):
    parts = sleeper.token().split(".")
    if not parts[part]:
        parts[part] = "AA"  # The key part is empty; it must stay so.
    else:
        data = bytearray(decode(parts[part]))
        data[len(data) // 2] ^= 1
        parts[part] = encode(bytes(data))
    answer = by_httpx(sleeper, auth(".".join(parts)))
    assert answer.status == 403 and answer.text in (MISSING, FAILED), f"part {part}: {answer}"


# -- 12: compression --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10, 4_000_000], ids=["small", "bomb"])
def test_case_12_a_compressed_token_is_refused_and_not_inflated(sleeper, forger, size):
    token = forger.zipped(size)
    assert len(token) < 8000, "a bomb that is too long would be refused for its length"
    before = sleeper.node.resident_mib()
    for _ in range(50 if size > 1000 else 1):
        answer = by_httpx(sleeper, auth(token))
        assert answer.status == 403 and answer.text in (MISSING, FAILED), str(answer)
    grown = sleeper.node.resident_mib() - before
    assert grown < 32, f"the node grew by {grown} MiB over tokens that would inflate to {size} bytes each"


# -- 14: nothing tells one wrong token from another --------------------------------------------------------------------


def test_case_14_and_4_whatever_is_wrong_with_a_token_the_answer_is_the_same(sleeper, forger, other):
    genuine = sleeper.token().split(".")
    flipped = lambda part: encode(bytes([decode(genuine[part])[0] ^ 1]) + decode(genuine[part])[1:])
    unknown = f"0b5e55ed-0000-4000-8000-000000000000.{sleeper.host.split('.', 1)[1]}"
    wrong = {
        "cut tag": ".".join(genuine[:4] + [genuine[4][:11]]),
        "flipped tag": ".".join(genuine[:4] + [flipped(4)]),
        "flipped text": ".".join(genuine[:3] + [flipped(3), genuine[4]]),
        "flipped IV": ".".join(genuine[:2] + [flipped(2)] + genuine[3:]),
        "short IV": forger.seal(iv_bytes=8),
        "no IV": ".".join(genuine[:2] + [""] + genuine[3:]),
        "no text": ".".join(genuine[:3] + ["", genuine[4]]),
        "key part": ".".join([genuine[0], "AAAA"] + genuine[2:]),
        "unknown kid": forger.seal(header=forger.header | {"kid": "00000000-0000-4000-8000-000000000000"}),
        "another key": forger.seal(key=os.urandom(32)),
        "no claims": forger.seal(plain=b"{}"),
    }
    foreign = {(sleeper.host, "a neighbour's"): other.token(), (unknown, "a neighbour's, no such host"): other.token()}
    for answers in (
        [seen(sleeper, sleeper.host, token) for token in wrong.values()],
        [seen(sleeper, host, token) for (host, _), token in foreign.items()],
    ):
        assert len(set(answers)) == 1, "\n".join(map(str, dict.fromkeys(answers)))


def seen(vm, host, token):
    """What a stranger reads: status, body, every field but the two that change each time."""
    answer = clients.raw_get(vm.node, host, [f"X-aws-proxy-auth: {token}"])
    return answer.status, answer.body, tuple((name, value) for name, value in answer.headers.items() if name not in ("date", "x-amzn-requestid"))


# -- 15: rotation -----------------------------------------------------------------------------------------------------


def test_case_15_the_key_is_rotated_under_traffic_and_nobody_is_refused(kitchen):
    """Tokens are minted and used all the time; one from before the first rotation is used all the time, too."""
    node, pid = kitchen.node, kitchen.node.process.pid
    old = kitchen.token(8080)
    header = lambda token: token.split(".")[0]
    stop, answers, headers = threading.Event(), [], set()

    def traffic(client, token):
        while not stop.is_set():
            fresh = token()
            headers.add(header(fresh))
            answer = client.get("/", headers={"X-aws-proxy-auth": fresh})
            answers.append((answer.status_code, answer.text if answer.status_code != 200 else ""))

    with kitchen.http(token=old) as one, kitchen.http(http2=True, token=old) as two:
        threads = [threading.Thread(target=traffic, args=pair) for pair in ((one, lambda: old), (two, lambda: kitchen.token(8080)))]
        for thread in threads:
            thread.start()
        try:
            seen_before = set()
            for _ in range(3):
                seen_before |= headers
                told = node.shell('"$1" rotate-token-key --data-dir "$2"', check=True).stdout
                assert f"process {pid}" in told, f"the command says whom it told: {told!r}"
                eventually("a token of the fresh key to be used", lambda: headers - seen_before, within=60)
        finally:
            stop.set()
            for thread in threads:
                thread.join(120)
    assert node.process.pid == pid and node.runs, "no restart"
    assert len(headers) == 4, f"three rotations make four keys: {len(headers)}"
    assert {status for status, _ in answers} == {200}, f"{len(answers)} requests: {set(answers)}"
    saved = json.loads((node.data_dir / "token-keys.json").read_text())["keys"]
    assert [key["opens_until"] is None for key in saved] == [True] + [False] * (len(saved) - 1) and len(saved) >= 4
    refused(by_httpx(kitchen, auth(forged_for_nobody(kitchen))), 403, FAILED)


def test_case_15_a_ring_that_is_not_there_is_not_made(node, tmp_path):
    done = node.shell(f'"$1" rotate-token-key --data-dir {tmp_path}')
    assert done.returncode == 1 and "dormouse serve makes it" in done.stderr, done
    assert list(tmp_path.iterdir()) == []


# -- 16: size ---------------------------------------------------------------------------------------------------------


def test_case_16_tokens_and_headers_too_large_take_no_memory_and_disturb_nobody(sleeper, kitchen):
    token = sleeper.token(8080)
    shapes = {
        "8,001 characters": ([f"X-aws-proxy-auth: {'a' * 8001}"], 403),
        "30,000 characters": ([f"X-aws-proxy-auth: {'a' * 30_000}"], 431),
        "1 MiB": ([f"X-aws-proxy-auth: {'a' * (1 << 20)}"], 431),
        "10,000 fields": ([f"X-aws-proxy-auth: {token}"] + ["a: 1"] * 10_000, 431),
    }

    def ask(lines):
        try:
            return clients.raw_get(sleeper.node, sleeper.host, lines)
        except OSError:
            return None  # The node did not wait for the rest of what it refuses, and this client was still writing.

    with kitchen.http() as neighbour:
        assert neighbour.get("/").status_code == 200
        for lines, _ in shapes.values():  # Once before the measure: the first of each kind may grow a buffer.
            ask(lines)
        before = sleeper.node.resident_mib()
        for _ in range(25):
            for shape, (lines, status) in shapes.items():
                answer = ask(lines)
                if answer is None and shape == "1 MiB":
                    continue
                assert answer and answer.status == status and answer.closed == (status == 431), f"{shape}: {answer}"
            assert neighbour.get("/").status_code == 200
    grown = sleeper.node.resident_mib() - before
    assert grown < 16, f"the node grew by {grown} MiB"


# -- 17 and 18: a token is a secret -----------------------------------------------------------------------------------


def test_case_16_a_token_may_have_eight_thousand_characters_and_no_more(kitchen, sleeper):
    """The longest value of AWS's model (case 16). A token of that length is of no length that ours ever have, and good."""
    forger = Forger(kitchen.node, kitchen.token(8080))
    longest = forger.of_length(7_998)
    assert 7_998 <= len(longest) <= 8_000
    answer = by_curl_h1(kitchen, auth(longest))
    assert answer.status == 200, f"{len(longest)} characters: {answer}"
    too_long = Forger(sleeper.node, sleeper.token(8080)).of_length(8_001)
    refused(by_curl_h1(sleeper, auth(too_long)), 403, MISSING)


def test_case_17_a_token_in_the_wrong_place_does_not_count(sleeper):
    token = sleeper.token()
    refused(by_curl_h1(sleeper, {}, path=f"/?X-aws-proxy-auth={token}"), 403, MISSING)
    refused(by_curl_h1(sleeper, {"Authorization": f"Bearer {token}"}), 403, MISSING)
    refused(by_curl_h1(sleeper, {"Cookie": f"X-aws-proxy-auth={token}"}), 403, MISSING)
    refused(clients.raw_get(sleeper.node, sleeper.host, [f"Sec-WebSocket-Protocol: lambda-microvms, lambda-microvms.authentication.{token}"]), 403, MISSING)


def test_case_17_a_token_in_a_body_or_a_trailer_does_not_count(sleeper):
    token = sleeper.token()
    form = sleeper.curl("--http1.1", "--data", f"X-aws-proxy-auth={token}", path="/upload")
    refused(form, 403, MISSING)
    for version in ("--http1.1", "--http2"):
        # curl shows the refusal also while it is still sending the form.
        refused(sleeper.curl(version, "--form", f"X-aws-proxy-auth={token}", "--form", "more=" + "x" * 20_000, path="/upload"), 403, MISSING)
    with clients.Raw(sleeper.node, sleeper.host) as connection:
        connection.send(
            f"POST /upload HTTP/1.1\r\nHost: {sleeper.endpoint}\r\nTransfer-Encoding: chunked\r\nTrailer: X-aws-proxy-auth\r\n\r\n"
            f"3\r\nabc\r\n0\r\nX-aws-proxy-auth: {token}\r\n\r\n".encode()
        )
        refused(connection.answer("POST"), 403, MISSING)


def test_case_17_a_trailer_does_not_stand_in_for_a_bad_token_nor_reach_the_app(kitchen):
    token = kitchen.token(8080)
    with clients.Raw(kitchen.node, kitchen.host) as connection:
        connection.send(
            f"POST /upload HTTP/1.1\r\nHost: {kitchen.endpoint}\r\nX-aws-proxy-auth: {kitchen.token(9000)}\r\nTransfer-Encoding: chunked\r\n\r\n"
            f"3\r\nabc\r\n0\r\nX-aws-proxy-auth: {token}\r\n\r\n".encode()
        )
        refused(connection.answer("POST"), 403, PORT_DENIED)


def test_case_18_no_answer_of_the_edge_holds_a_part_of_a_token(sleeper, forger, other):
    """Logs, metrics and files are searched when the node is closed, over every token of the run."""
    genuine = sleeper.token(9000)
    tokens = [genuine, other.token(), forger.with_claims(exp=1), forger.seal(tag_bytes=8), genuine + "A", genuine.replace(".", "")]
    for token in tokens:
        for lines in (
            [f"X-aws-proxy-auth: {token}"], [f"X-aws-proxy-auth: {token}", f"X-aws-proxy-port: {token}"], [f"X-aws-proxy-auth: {token}"] * 2,
            [f"Cookie: {token}"], [f"Transfer-Encoding: {token}"], [f"{token}: 1"], [f" {token}"], [f"Expect: {token}"],
        ):
            with clients.Raw(sleeper.node, sleeper.host) as connection:
                connection.send(b"".join(f"{line}\r\n".encode() for line in [f"GET /{token} HTTP/1.1", f"Host: {sleeper.endpoint}", "Connection: close", *lines, ""]))
                data = bytearray()
                try:
                    while piece := connection.socket.recv(65536):
                        data += piece
                except OSError:
                    pass  # Closed in the middle of what it did not want to read.
            assert data.startswith(b"HTTP/1.1 4"), f"{lines}: {bytes(data[:200])}"
            assert not Tokens(tokens).found_in(bytes(data)), bytes(data)


@pytest.mark.parametrize("pair", ["good then bad", "bad then good", "the same twice"])
def test_two_tokens_are_no_token(sleeper, pair):
    good = sleeper.token()
    pair = {"good then bad": (good, "x"), "bad then good": ("x", good), "the same twice": (good, good)}[pair]
    answer = clients.raw_get(sleeper.node, sleeper.host, [f"X-aws-proxy-auth: {token}" for token in pair])
    assert answer.status == 403, f"never the first, never the last: {answer}"


def test_no_part_of_a_token_is_in_the_memory_of_a_guest(node, run, kitchen_image):
    """What went to sleep with a microVM is searched: by every way a token may come, nothing of it is in the memory, the devices
    or the disk. A note that the app was given is there, so that the search would have found it."""
    vm = run(kitchen_image)
    token = vm.token(ALL_PORTS)
    marker = os.urandom(24).hex()
    for by in (by_curl_h1, by_curl_h2, by_httpx):
        assert by(vm, auth(token)).status == 200
    offered = ["lambda-microvms", f"lambda-microvms.authentication.{token}"]
    with websocket(f"wss://{vm.endpoint}/ws", ssl=clients.tls(node), subprotocols=offered, open_timeout=60, proxy=None) as connection:
        connection.send("hello")
        assert connection.recv(60) == "hello"
    with vm.http() as client:
        assert client.put("/note?name=marker", content=marker).status_code == 200
    vm.suspend()
    directory = node.data_dir / "microvms" / vm.id
    assert Tokens([marker]).found_under(directory, largest=1 << 34), "the search does not find what the app was told"
    found = Tokens([token, *node.minted]).found_under(directory, largest=1 << 34)
    assert not found, found[:5]


def test_the_guest_sees_neither_the_token_nor_any_word_of_the_platform(kitchen):
    """Whatever the client sends under the reserved prefix, the app must not see it."""
    with kitchen.http(8080, **{"X-aws-proxy-port": "8080", "X-Aws-Proxy-Whatever": "1", "X-App": "kept"}) as client:
        seen = {name.lower(): value for name, value in client.get("/headers?a=1").json()["headers"]}
    assert not [name for name in seen if name.startswith("x-aws-proxy")], f"reserved headers reached the app: {sorted(seen)}"
    assert seen["x-app"] == "kept"
    assert seen["host"] == kitchen.endpoint, "the app sees the public name"
    assert seen.get("x-amzn-requestid"), "and the request's id"
    assert not [name for name in seen if name.startswith("x-forwarded") or name in ("via", "forwarded")], f"AWS adds none of these: {sorted(seen)}"
