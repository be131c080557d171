"""The story of the article, told twice: by boto3, and by the `aws` command with curl.

An app that counts in memory is put into an image, run, called, suspended, and called again: it must not notice.
"""
import base64
import json
import subprocess
import sys

from harness import clients, images
from harness.microvm import Microvm

ROLE = "arn:aws:iam::123456789012:role/MicroVMExecutionRole"


def test_an_app_sleeps_and_wakes_and_remembers_everything(node, run, hello_image):
    vm = run(hello_image, executionRoleArn=ROLE, idle={"maxIdleDurationSeconds": 300, "suspendedDurationSeconds": 600, "autoResumeEnabled": True})
    before = [vm.count() for _ in range(3)]
    first = before[0]["requests_served"]
    assert [answer["requests_served"] for answer in before] == [first, first + 1, first + 2]
    assert before[-1]["pid"] == 1, f"the app is pid 1 of its world, it says {before[-1]['pid']}"
    assert before[-1]["message"] == "Hello from Lambda MicroVM!"

    vm.suspend()
    assert not vm.processes(), f"a suspended microVM costs no process, but there is {vm.processes()}"
    wakes = node.wakes()
    after = vm.count()  # A plain request, with no word about the microVM being asleep.

    assert after["pid"] == 1
    assert after["requests_served"] == before[-1]["requests_served"] + 1, f"the counter goes on: {before[-1]} then {after}"
    assert after["uptime_seconds"] > before[-1]["uptime_seconds"], f"uptime includes the sleep: {before[-1]} then {after}"
    assert vm.state == "RUNNING"
    assert node.wakes() == wakes + 1

    vm.terminate()
    assert vm.view()["stateReason"] == "Success."


def test_uptime_includes_the_sleep_to_the_second(run, hello_image, kitchen):
    """The guest's wall clock is right before the first byte reaches the app."""
    vm = run(hello_image)
    before = vm.count()
    start = kitchen_clock(kitchen)
    vm.suspend()
    # Five seconds of sleep, measured on the clock of another guest: no clock of this process is part of the proof.
    with kitchen.http() as client:
        client.get("/slow?seconds=5")
    slept = kitchen_clock(kitchen) - start
    grown = vm.count()["uptime_seconds"] - before["uptime_seconds"]
    assert slept - 2 < grown < slept + 10, f"the app counted {grown:.1f} s while {slept:.1f} s passed outside"


def kitchen_clock(vm):
    with vm.http() as client:
        return client.get("/time").json()["realtime"]


def test_the_aws_command_can_do_all_of_it(node, hello_image, tmp_path):
    """`eval "$(dormouse env)"` and nothing else: upload, image, microVM, token, call, suspend, call, terminate."""
    artifact = tmp_path / "artifact.zip"
    artifact.write_bytes(images.zip_of(**{"Dockerfile": "FROM scratch\n"}))
    node.shell(f"aws s3 mb s3://my-bucket && aws s3 cp {artifact} s3://my-bucket/artifact.zip && aws s3 ls s3://my-bucket/", check=True)
    back = tmp_path / "back.zip"
    node.shell(f"aws s3 cp s3://my-bucket/artifact.zip {back}", check=True)
    assert back.read_bytes() == artifact.read_bytes(), "what goes into S3 comes out of it"

    image = node.aws("lambda-microvms", "get-microvm-image", "--image-identifier", hello_image)
    assert image["state"] == "CREATED" and image["latestActiveImageVersion"] == "1.0", image
    managed = node.aws("lambda-microvms", "list-managed-microvm-images")["items"]
    assert any(item["imageArn"].endswith(":microvm-image:al2023-1") for item in managed), managed

    ran = node.aws(
        "lambda-microvms", "run-microvm", "--image-identifier", hello_image, "--execution-role-arn", ROLE,
        "--idle-policy", '{"maxIdleDurationSeconds":300,"suspendedDurationSeconds":60,"autoResumeEnabled":true}',
    )
    vm = Microvm(node, ran)
    try:
        vm.reaches("RUNNING", within=120)
        token = node.aws(
            "lambda-microvms", "create-microvm-auth-token", "--microvm-identifier", vm.id, "--expiration-in-minutes", "15",
            "--allowed-ports", '[{"port":8080}]',
        )["authToken"]
        node.minted.extend(token.values())
        header = ["--header", f"X-aws-proxy-auth: {token['X-aws-proxy-auth']}"]
        before = vm.curl("--http1.1", *header).json()
        node.aws("lambda-microvms", "suspend-microvm", "--microvm-identifier", vm.id)
        vm.reaches("SUSPENDED", within=60)
        after = vm.curl("--http2", *header).json()
        assert after["requests_served"] == before["requests_served"] + 1 and after["pid"] == 1, (before, after)
        listed = node.aws("lambda-microvms", "list-microvms")["items"]
        assert vm.id in [item["microvmId"] for item in listed]
    finally:
        node.aws("lambda-microvms", "terminate-microvm", "--microvm-identifier", vm.id)
    vm.reaches("TERMINATED", within=60)


def test_boto3_needs_nothing_but_the_environment(node):
    script = "import boto3, json; print(json.dumps([i['imageArn'] for i in boto3.client('lambda-microvms').list_managed_microvm_images()['items']]))"
    answer = node.shell(f'"{sys.executable}" -c "{script}"', check=True)
    assert json.loads(answer.stdout), "the node has at least one managed base image"


def test_curl_needs_nothing_but_the_ca(node, kitchen):
    """As the documentation shows it: no --resolve; curl itself knows that *.localhost is here."""
    command = ["curl", "-sS", "--noproxy", "*", "--cacert", str(node.ca), "-H", f"X-aws-proxy-auth: {kitchen.token()}", kitchen.url + "/"]
    answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["pid"] == 1


def test_both_protocols_of_http_are_offered_and_the_newer_first(node, kitchen):
    for offered, chosen in ((["h2", "http/1.1"], "h2"), (["http/1.1", "h2"], "h2"), (["http/1.1"], "http/1.1")):
        with clients.Raw(node, kitchen.host, alpn=offered) as connection:
            assert connection.socket.selected_alpn_protocol() == chosen, f"offered {offered}"


def test_a_token_looks_like_one_of_aws(kitchen):
    minted = kitchen.mint(8080)
    assert list(minted) == ["X-aws-proxy-auth"]
    parts = minted["X-aws-proxy-auth"].split(".")
    header = json.loads(base64.urlsafe_b64decode(parts[0] + "=="))
    assert len(parts) == 5 and parts[1] == "" and header["alg"] == "dir" and header["enc"] == "A256GCM" and header["kid"], header
