"""What a person gets wrong: each is refused at once, with a sentence that says what is wrong and where."""
import json
import socket
import struct
import subprocess
import urllib.error
import urllib.request

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from harness import clients, images
from harness.node import binary
from harness.waiting import eventually

FROM = "FROM public.ecr.aws/lambda/microvms:al2023-minimal\n"


# -- configuration ----------------------------------------------------------------------------------------------------


def serve_with(tmp_path, text):
    config = tmp_path / "dormouse.toml"
    config.write_text(text)
    return subprocess.run(
        [binary(), "serve", "--config", config, "--data-dir", tmp_path / "data"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,
    )


@pytest.mark.parametrize("text, named", [
    ('[edge]\nlistne = "127.0.0.1:0"\n', "edge.listne"),
    ("[lifecycel]\nx = 1\n", "lifecycel"),
    ('[edge]\nlisten = "everywhere"\n', "edge.listen"),
    ("[edge]\nlisten = 8443\n", "edge.listen"),
    ("[lifecycle]\nmax_microvms = -1\n", "lifecycle.max_microvms"),
    ('domain_suffix = "microvm.localhost"\n', "domain_suffix"),
    ("[edge\n", "TOML"),
], ids=["unknown key", "unknown section", "no address", "number for text", "negative", "no section", "not TOML"])
def test_a_wrong_configuration_ends_the_node_with_64_and_the_key(tmp_path, text, named):
    ended = serve_with(tmp_path, text)
    assert ended.returncode == 64, f"{ended.returncode}: {ended.stderr}"
    assert named in ended.stderr, f"the key must be named: {ended.stderr}"
    assert "panicked" not in ended.stderr
    assert not (tmp_path / "data").exists(), "and nothing was touched"


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    ended = serve_with(tmp_path, '[edge]\nlistne = "x"\nhold_secs = 0\n[api]\nlisten = 1\n')
    assert all(key in ended.stderr for key in ("edge.listne", "edge.hold_secs", "api.listen")), ended.stderr


def test_a_configuration_that_is_not_there_is_named(tmp_path):
    ended = subprocess.run([binary(), "serve", "--config", tmp_path / "nowhere.toml"], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 64 and "nowhere.toml" in ended.stderr, ended.stderr


def test_an_address_in_use_is_named(node, tmp_path):
    ended = serve_with(tmp_path, f'[edge]\nlisten = "{node.edge}"\n[api]\nlisten = "127.0.0.1:0"\n[admin]\nlisten = "127.0.0.1:0"\n')
    assert ended.returncode not in (0, 64, 101) and node.edge in ended.stderr, f"{ended.returncode}: {ended.stderr}"


# -- image builds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, archive, code, words", [
    ("not-a-zip", b"this is not a zip", "ARCHIVE_INVALID", []),
    ("cut-off-zip", images.zip_of(Dockerfile=FROM, **{"big.bin": "x" * 100_000})[:-60], "ARCHIVE_INVALID", []),
    ("empty-zip", images.zip_of(), "ARCHIVE_DOCKERFILE_NOT_FOUND", []),
    ("no-dockerfile", images.zip_of(**{"app.py": "print(1)"}), "ARCHIVE_DOCKERFILE_NOT_FOUND", []),
    ("dockerfile-in-a-folder", images.zip_of(**{"src/Dockerfile": FROM}), "ARCHIVE_DOCKERFILE_NOT_FOUND", []),
    ("leaves-its-directory", images.zip_of(Dockerfile=FROM, **{"../../etc/evil": "x"}), "ARCHIVE_INVALID", []),
    ("bad-dockerfile", images.zip_of(Dockerfile=FROM + "FRMO scratch\n"), "CONTAINER_BUILD_FAILED", ["FRMO"]),
    ("failing-step", images.zip_of(Dockerfile=FROM + "RUN echo words-of-the-step >&2; exit 3\n"), "CONTAINER_BUILD_FAILED", ["words-of-the-step"]),
    ("missing-file", images.zip_of(Dockerfile=FROM + "COPY nowhere.py .\n"), "CONTAINER_BUILD_FAILED", ["nowhere.py"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_build_that_cannot_work_says_why(node, name, archive, code, words):
    with pytest.raises(images.BuildFailed) as failed:
        images.build(node, name, archive)
    said = str(failed.value)
    assert said.startswith("CREATE_FAILED") and code in said, said
    for word in words:
        assert word in said, f"the reason should show {word!r}: {said}"


def test_an_app_that_ends_at_once_fails_its_build(node):
    with pytest.raises(images.BuildFailed) as failed:
        images.build(node, "ends-at-once", images.zip_of(Dockerfile=FROM + 'EXPOSE 8080\nCMD ["sh", "-c", "echo last words; exit 9"]\n'))
    assert "9" in str(failed.value) or "last words" in str(failed.value), str(failed.value)


# -- the control API --------------------------------------------------------------------------------------------------


def refusal(call, **request):
    with pytest.raises(ClientError) as refused:
        call(**request)
    response = refused.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"], response["Error"].get("Message") or ""


IMAGE = {"baseImageArn": images.base_image_arn("us-east-1"), "buildRoleArn": images.ROLE}


def test_an_artifact_that_is_not_there(node):
    node.client("s3").create_bucket(Bucket="empty-bucket")
    client = node.client()
    arn = client.create_microvm_image(name="no-artifact", codeArtifact={"uri": "s3://empty-bucket/nothing.zip"}, **IMAGE)["imageArn"]
    with pytest.raises(images.BuildFailed, match="S3_NO_SUCH_KEY"):
        images.finish_build(node, arn)
    arn = client.create_microvm_image(name="no-bucket", codeArtifact={"uri": "s3://no-such-bucket/nothing.zip"}, **IMAGE)["imageArn"]
    with pytest.raises(images.BuildFailed, match="S3_NO_SUCH_BUCKET"):
        images.finish_build(node, arn)


def test_an_artifact_that_is_no_s3_uri(node):
    status, code, message = refusal(node.client().create_microvm_image, name="no-uri", codeArtifact={"uri": "https://example.com/a.zip"}, **IMAGE)
    assert (status, code) == (400, "ValidationException")
    assert message == "CodeArtifact URI must be a valid S3 URI in the format: s3://<bucket>/<key>"


def test_a_size_that_does_not_exist(node):
    status, code, message = refusal(
        node.client().create_microvm_image, name="odd-size", codeArtifact={"uri": "s3://artifacts/x.zip"}, resources=[{"minimumMemoryInMiB": 1000}], **IMAGE,
    )
    assert (status, code) == (400, "ValidationException") and "[512, 1024, 2048, 4096, 8192]" in message, message


def test_a_name_twice(node, kitchen_image):
    status, code, message = refusal(node.client().create_microvm_image, name="kitchen-sink", codeArtifact={"uri": "s3://artifacts/kitchen-sink.zip"}, **IMAGE)
    assert (status, code, message) == (400, "ValidationException", "A MicroVM image with the name 'kitchen-sink' already exists in this account")


def test_running_what_does_not_exist(node):
    client = node.client()
    status, code, _ = refusal(client.run_microvm, imageIdentifier="arn:aws:lambda:us-east-1:000000000000:microvm-image:nothing")
    assert (status, code) == (404, "ResourceNotFoundException")
    nobody = "microvm-00000000-0000-4000-8000-000000000000"
    for call in (client.get_microvm, client.suspend_microvm, client.resume_microvm):
        status, code, message = refusal(call, microvmIdentifier=nobody)
        assert (status, code, message) == (404, "ResourceNotFoundException", f"MicroVM not found: {nobody}")


@pytest.mark.parametrize("minutes, message", [(61, "ExpirationMinutes 61 exceeded max allowed of 60."), (0, ""), (-1, "")])
def test_a_token_for_too_long_or_no_time(node, kitchen, minutes, message):
    status, code, said = refusal(
        node.client(parameter_validation=False).create_microvm_auth_token,
        microvmIdentifier=kitchen.id, expirationInMinutes=minutes, allowedPorts=[{"port": 8080}],
    )
    assert (status, code) == (400, "ValidationException") and message in said, said


@pytest.mark.parametrize("ports", [
    [], [{}], [{"port": 0}], [{"port": 65536}], [{"port": "8080"}], [{"range": {"startPort": 9, "endPort": 8}}], [{"range": {"startPort": 9}}],
    [{"port": 1, "allPorts": {}}], [{"allPorts": True}], [{"everything": {}}],
], ids=str)
def test_a_token_for_ports_that_are_none(node, kitchen, ports):
    # boto3 would not send most of these: signed by botocore, written by hand.
    settings = node.environment
    request = AWSRequest(
        "POST", f"{settings['AWS_ENDPOINT_URL_LAMBDA_MICROVMS']}/2025-09-09/microvms/{kitchen.id}/auth-token",
        data=json.dumps({"expirationInMinutes": 15, "allowedPorts": ports}), headers={"Content-Type": "application/json"},
    )
    SigV4Auth(Credentials(settings["AWS_ACCESS_KEY_ID"], settings["AWS_SECRET_ACCESS_KEY"]), "lambda", settings["AWS_REGION"]).add_auth(request)
    plain = urllib.request.Request(request.url, data=request.data.encode(), headers=dict(request.headers), method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(plain, timeout=30)
    assert refused.value.code == 400, f"{refused.value.code} {refused.value.read()!r}"
    assert refused.value.headers["x-amzn-errortype"], "without the type an SDK reports a generic error"


def test_an_idle_policy_with_a_part_missing(node, kitchen_image):
    status, code, message = refusal(
        node.client(parameter_validation=False).run_microvm, imageIdentifier=kitchen_image,
        idlePolicy={"maxIdleDurationSeconds": 60, "suspendedDurationSeconds": 60},
    )
    assert (status, code) == (400, "ValidationException") and "idlePolicy.autoResumeEnabled" in message, message


def test_a_request_that_nobody_signed_or_somebody_else_did(node):
    url = f"http://{node.api}/2025-09-09/microvms"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(url, timeout=30)
    assert refused.value.code == 403
    stranger = node.shell("AWS_SECRET_ACCESS_KEY=wrong aws lambda-microvms list-microvms")
    assert stranger.returncode != 0 and "InvalidSignatureException" in stranger.stderr + stranger.stdout, stranger.stderr
    stranger = node.shell("AWS_ACCESS_KEY_ID=AKIANOBODY aws s3 ls")
    assert stranger.returncode != 0, stranger.stdout


# -- the edge ---------------------------------------------------------------------------------------------------------


def test_a_header_of_a_mebibyte_is_too_large(node, kitchen):
    with clients.Raw(node, kitchen.host) as connection:
        try:
            connection.send(f"GET / HTTP/1.1\r\nHost: {kitchen.endpoint}\r\nX-Big: ".encode() + b"x" * (1 << 20) + b"\r\n\r\n")
        except OSError:
            pass  # Answered and closed before all of it was sent: that is the point.
        answer = connection.answer()
    assert answer.status == 431 and answer.closed, f"431 and close: {answer}"


def test_ten_thousand_headers_are_too_many(node, kitchen):
    with clients.Raw(node, kitchen.host) as connection:
        try:
            connection.send(f"GET / HTTP/1.1\r\nHost: {kitchen.endpoint}\r\n".encode() + b"a: b\r\n" * 10_000 + b"\r\n")
        except OSError:
            pass
        answer = connection.answer()
    assert answer.status == 431 and answer.closed, f"431 and close: {answer}"


@pytest.mark.parametrize("request_text", [
    "NONSENSE\r\n\r\n",
    "GET / HTTP/9.9\r\nHost: {host}\r\n\r\n",
    "GET / HTTP/1.1\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\r\nHost: {host}\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: {host}\r\nX-aws-proxy-auth : x\r\n\r\n",
], ids=["not HTTP", "odd version", "no host", "two hosts", "two lengths", "length and chunks", "blank before the colon"])
def test_what_is_not_http_is_refused_and_closed(node, kitchen, request_text):
    with clients.Raw(node, kitchen.host) as connection:
        connection.send(request_text.format(host=kitchen.endpoint).encode())
        answer = connection.answer()
        assert 400 <= answer.status < 500 or (answer.status == 0 and answer.closed), str(answer)
        assert answer.status not in (200, 502), str(answer)


def test_a_client_that_leaves_in_the_handshake_of_http2_is_no_error_of_the_node(node, kitchen):
    """An error in the log means that a person must act; what any client can cause is none."""
    begin = node.log.stat().st_size
    for preface in (b"", b"PRI * HT", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
        connection = clients.Raw(node, kitchen.host, alpn=("h2",))
        connection.send(preface)
        # A reset instead of an orderly end.
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    eventually("every connection to be gone", lambda: node.metrics().total("edge_connections") == 0, within=60)
    with node.log.open() as log:
        log.seek(begin)
        errors = [line for line in log if "ERROR" in line]
    assert not errors, errors


def test_plain_http_on_the_tls_port_is_not_served(node):
    host, port = node.edge.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=30) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        try:
            said = plain.recv(1000)
        except ConnectionResetError:
            said = b""
    assert not said.startswith(b"HTTP/1.1 2"), said
