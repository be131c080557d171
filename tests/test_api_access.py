"""Who may use the control API, how often, and which signatures it takes. A node of its own, with four access keys.

Most of it needs no image: what a key may not do is refused before it is looked at what there is.
"""
import concurrent.futures
import datetime
import json
import os
import socket
import urllib.error
import urllib.request

import pytest
from botocore.auth import SigV4Auth, SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from harness import aws_model, images
from harness.node import Node
from harness.waiting import eventually

ADMIN, OPERATOR, MINTER, NOBODY = ((f"AKIA{name}", f"secret-of-{name}") for name in ("ADMIN", "OPERATOR", "MINTER", "NOBODY"))
SETTINGS = f"""
[[api.keys]]
id = "{OPERATOR[0]}"
role = "operator"
[[api.keys]]
id = "{MINTER[0]}"
role = "token-minter"
images = ["mine"]
[api.rates]
list_microvms_per_second = 2
others_per_second = 0
"""
LIST = "/2025-09-09/microvms"
STRANGER = "microvm-00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def guarded(run_dir):
    node = Node(run_dir / "guarded", api_settings=SETTINGS)
    node.data_dir.mkdir(mode=0o700)
    credentials = node.data_dir / "credentials"
    profiles = zip(("default", "ops", "mint", "nobody"), (ADMIN, OPERATOR, MINTER, NOBODY))
    credentials.write_text("".join(f"[{name}]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n" for name, (id, secret) in profiles))
    credentials.chmod(0o600)
    with node:
        yield node


def refused(call, **request):
    with pytest.raises(ClientError) as error:
        call(**request)
    return error.value.response


def test_roles_as_boto3_meets_them(guarded):
    strict = lambda key: aws_model.watch(guarded.fresh_client(key=key), [])
    arn = "arn:aws:lambda:us-east-1:000000000000:microvm-image:mine"
    image = {"name": "mine", "baseImageArn": images.base_image_arn("us-east-1"), "buildRoleArn": images.ROLE, "codeArtifact": {"uri": "s3://none/none.zip"}}
    operator, minter, nobody = strict(OPERATOR), strict(MINTER), strict(NOBODY)
    for client, user, call, request, action, resource in [
        (operator, "ops", operator.create_microvm_image, image, "CreateMicrovmImage", arn),
        (operator, "ops", operator.tag_resource, {"Resource": arn, "Tags": {"a": "b"}}, "TagResource", arn),
        (minter, "mint", minter.run_microvm, {"imageIdentifier": arn}, "RunMicrovm", arn),
        (minter, "mint", minter.terminate_microvm, {"microvmIdentifier": STRANGER}, "TerminateMicrovm", "*"),
        (minter, "mint", minter.list_microvm_images, {}, "ListMicrovmImages", "*"),
        (nobody, "nobody", nobody.get_microvm, {"microvmIdentifier": STRANGER}, "GetMicrovm", "*"),
    ]:
        answer = refused(call, **request)
        assert answer["ResponseMetadata"]["HTTPStatusCode"] == 403 and answer["Error"]["Code"] == "AccessDeniedException", answer
        assert answer["Error"]["Message"].startswith(
            f"User: arn:aws:iam::000000000000:user/{user} is not authorized to perform: lambda:{action} on resource: {resource} "), answer
    for client in (operator, minter):
        assert client.list_microvms()["items"] == []
        assert refused(client.get_microvm, microvmIdentifier=STRANGER)["Error"]["Code"] == "ResourceNotFoundException"
    assert operator.list_microvm_images()["items"] == []


def test_roles_as_the_aws_command_meets_them(guarded):
    as_key = lambda key, command: guarded.shell(f"AWS_ACCESS_KEY_ID={key[0]} AWS_SECRET_ACCESS_KEY={key[1]} aws {command}")
    assert as_key(OPERATOR, "s3 mb s3://operators-code").returncode == 0
    for key, command, words in [
        (MINTER, "lambda-microvms list-microvm-images", "user/mint is not authorized to perform: lambda:ListMicrovmImages"),
        (MINTER, "s3 ls s3://operators-code", "AccessDenied"),
    ]:
        ended = as_key(key, command)
        assert ended.returncode != 0 and words in ended.stderr, f"{command}: {ended.returncode} {ended.stderr}"


def test_the_code_of_images_is_for_admins_and_operators(guarded):
    stores = {key: guarded.fresh_client("s3", key=key) for key in (ADMIN, OPERATOR, MINTER, NOBODY)}
    stores[ADMIN].create_bucket(Bucket="admins-code")
    stores[OPERATOR].put_object(Bucket="admins-code", Key="a.zip", Body=b"zip")
    for key in (MINTER, NOBODY):
        for call, request in [
            ("list_buckets", {}), ("get_object", {"Bucket": "admins-code", "Key": "a.zip"}), ("delete_object", {"Bucket": "admins-code", "Key": "a.zip"}),
            ("put_object", {"Bucket": "admins-code", "Key": "b.zip", "Body": b"evil"}), ("create_bucket", {"Bucket": "mine"}),
        ]:
            assert refused(getattr(stores[key], call), **request)["Error"]["Code"] == "AccessDenied", f"{key[0]} {call}"
    assert stores[OPERATOR].get_object(Bucket="admins-code", Key="a.zip")["Body"].read() == b"zip"


def test_botocore_takes_a_throttled_call_for_one_and_tries_again(guarded):
    """429 with Retry-After, until the allowance is back: the caller sees the answer, and that it took more than one attempt."""
    client = aws_model.watch(guarded.fresh_client(key=OPERATOR, retries={"mode": "standard", "total_max_attempts": 8}), [])
    attempts = []
    for _ in range(40):
        attempts.append(client.list_microvms()["ResponseMetadata"]["RetryAttempts"])
        if attempts[-1]:
            break
    assert attempts[-1] >= 1, f"no call of {len(attempts)} was throttled, at 2 a second"
    # Without tries of its own, a client reads the refusal; other keys and other operations have their own allowance.
    once = aws_model.watch(guarded.fresh_client(key=OPERATOR), [])
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: outcome(once.list_microvms), range(20)))
    throttled = [answer for answer in answers if answer["ResponseMetadata"]["HTTPStatusCode"] == 429]
    assert throttled, [answer["ResponseMetadata"]["HTTPStatusCode"] for answer in answers]
    for answer in throttled:
        assert answer["Error"]["Code"] == "ThrottlingException" and answer["ResponseMetadata"]["HTTPHeaders"]["retry-after"] == "1", answer
    assert once.list_microvm_images()["ResponseMetadata"]["HTTPStatusCode"] == 200
    assert guarded.fresh_client(key=ADMIN).list_microvms()["ResponseMetadata"]["HTTPStatusCode"] == 200


def outcome(call, **request):
    try:
        return call(**request)
    except ClientError as error:
        return error.response


# -- signatures -------------------------------------------------------------------------------------------------------


def signed(node, method, path, body=b"", *, key=ADMIN, auth=SigV4Auth, headers=(), age=0, monkeypatch=None, **more):
    request = AWSRequest(method, f"http://{node.api}{path}", data=body, headers=dict(headers))
    if age:
        now = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=age)
        monkeypatch.setattr("botocore.auth.get_current_datetime", lambda remove_tzinfo=True: now.replace(tzinfo=None) if remove_tzinfo else now)
    auth(Credentials(*key), "lambda", "us-east-1", **more).add_auth(request)
    if age:
        monkeypatch.undo()
    return request


def send(request, *, body=None):
    prepared = request.prepare()
    data = prepared.body if body is None else body
    plain = urllib.request.Request(prepared.url, data=data or None, headers=dict(prepared.headers.items()), method=prepared.method)
    try:
        with urllib.request.urlopen(plain, timeout=30) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, error.headers["x-amzn-errortype"]


GET = f"{LIST}/{STRANGER}"


def test_forged_stale_and_truncated_signatures(guarded, monkeypatch):
    assert send(signed(guarded, "GET", GET)) == (404, "ResourceNotFoundException"), "a good one"
    for what, age, expected in [("6 minutes old", 360, 403), ("4 minutes old", 240, 404), ("4 minutes early", -240, 404), ("6 minutes early", -360, 403)]:
        status, kind = send(signed(guarded, "GET", GET, age=age, monkeypatch=monkeypatch))
        assert status == expected and kind == ("ResourceNotFoundException" if expected == 404 else "InvalidSignatureException"), f"{what}: {status} {kind}"
    stranger = send(signed(guarded, "GET", GET, key=("AKIASTRANGER", "secret")))
    assert stranger == (403, "UnrecognizedClientException")
    assert send(signed(guarded, "GET", GET, key=(ADMIN[0], "guessed"))) == (403, "InvalidSignatureException")
    for cut in (1, 10, 63, 64, 90):
        request = signed(guarded, "GET", GET)
        request.headers.replace_header("Authorization", request.headers["Authorization"][:-cut])
        status, kind = send(request)
        assert (status, kind) in [(403, "InvalidSignatureException"), (403, "IncompleteSignatureException")], f"{cut} characters less: {status} {kind}"
    other = signed(guarded, "POST", LIST, b'{"imageIdentifier": "mine"}')
    assert send(other, body=b'{"imageIdentifier": "other"}') == (403, "InvalidSignatureException")
    other = signed(guarded, "GET", GET)
    other.url = other.url.replace("0000-4000", "0000-4001")
    assert send(other) == (403, "InvalidSignatureException")


def test_a_body_that_is_not_signed_is_not_taken(guarded):
    body = b'{"imageIdentifier": "mine"}'
    for told in ("UNSIGNED-PAYLOAD", "STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "0" * 64, "e3b0c442"):
        request = signed(guarded, "POST", LIST, body, headers={"X-Amz-Content-SHA256": told})
        assert send(request) == (403, "InvalidSignatureException"), told
    assert send(signed(guarded, "POST", LIST, body)) == (404, "ResourceNotFoundException"), "there is no such image; the signature is good"


def test_presigned_urls_hold_until_they_expire(guarded, monkeypatch):
    presigned = lambda **more: send(signed(guarded, "GET", GET, auth=SigV4QueryAuth, monkeypatch=monkeypatch, **more))
    assert presigned(expires=60) == (404, "ResourceNotFoundException")
    assert presigned(expires=600, age=540) == (404, "ResourceNotFoundException")
    assert presigned(expires=600, age=660) == (403, "InvalidSignatureException")
    assert presigned(expires=604_801) == (403, "IncompleteSignatureException")
    changed = signed(guarded, "GET", GET, auth=SigV4QueryAuth, expires=60)
    changed.url = changed.url.replace("X-Amz-Expires=60", "X-Amz-Expires=61")
    assert send(changed) == (403, "InvalidSignatureException")


def test_who_does_not_sign_takes_nobodys_turn(guarded):
    """300 connections that begin a body and never end it: more than the node works on at a time (256)."""
    host, port = guarded.api.rsplit(":", 1)
    waiting = []
    try:
        for number in range(300):
            one = socket.create_connection((host, int(port)), timeout=30)
            key = "" if number % 2 else f"Authorization: AWS4-HMAC-SHA256 Credential=AKIASTRANGER/20260101/us-east-1/lambda/aws4_request, SignedHeaders=host, Signature={'0' * 64}\r\n"
            one.sendall(f"POST {LIST} HTTP/1.1\r\nHost: {guarded.api}\r\n{key}Content-Length: 1000000\r\n\r\n{{".encode())
            waiting.append(one)
        assert send(signed(guarded, "GET", GET)) == (404, "ResourceNotFoundException")
        # Refused while the body has not ended.
        answer = waiting[0].recv(4096)
        assert answer.startswith(b"HTTP/1.1 403 "), answer
    finally:
        for one in waiting:
            one.close()


def test_the_node_says_who_did_what_without_saying_secrets(guarded):
    log = guarded.log.read_text()
    for _, secret in (ADMIN, OPERATOR, MINTER, NOBODY):
        assert secret not in log
    assert eventually("the calls to be counted", lambda: guarded.metrics().total("api_requests_total", operation="ListMicrovms", code="429") >= 1, within=10)
