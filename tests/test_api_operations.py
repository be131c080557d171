"""Every operation by the `aws` command, with what is right and with what is not, and callers who come at the same time."""
import concurrent.futures
import contextlib
import io
import json
import os
import re

import httpx
import pytest
from awscli.clidriver import create_clidriver
from botocore.exceptions import ClientError

from harness import aws_model, clients, images
from harness.microvm import Microvm
from harness.waiting import eventually

MODEL = aws_model.model()
NOBODY = "microvm-00000000-0000-4000-8000-000000000000"
NOTHING = "arn:aws:lambda:us-east-1:000000000000:microvm-image:nothing"
BASE = images.base_image_arn("us-east-1")
CONNECTOR = "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:"


class Aws:
    """The aws command in this process: its parser, its client, its output and its exit code, without the second it takes to
    start. (That `dormouse env` makes the real one work is shown by test_story.py and others.)"""

    def __init__(self, node, monkeypatch):
        for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_DATA_PATH"]:
            monkeypatch.delenv(name)
        for name, value in (node.environment | {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "AWS_PAGER": ""}).items():
            monkeypatch.setenv(name, value)
        self.driver = create_clidriver()
        self.done = set()

    def __call__(self, operation, **options):
        code, said, complaint = self.run(operation, **options)
        assert code == 0, f"{operation} {options}: {code} {complaint}"
        self.done.add(operation)
        return json.loads(said) if said.strip() else {}

    def run(self, operation, **options):
        arguments = ["lambda-microvms", operation, "--output", "json"]
        for name, value in options.items():
            arguments += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = self.driver.main(arguments)
        return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def aws(node):
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Aws(node, monkeypatch)


def command(operation):
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", operation).lower()


def test_every_operation_by_the_aws_command(node, kitchen_image, aws):
    aws.done.clear()
    image = dict(image_identifier=kitchen_image)
    assert aws("list-managed-microvm-images")["items"][0]["imageArn"] == BASE
    assert {item["imageVersion"] for item in aws("list-managed-microvm-image-versions", image_identifier=BASE)["items"]} == {"0", "1"}
    assert kitchen_image in [item["imageArn"] for item in aws("list-microvm-images", name_filter="kitchen")["items"]]
    assert aws("get-microvm-image", **image)["state"] == "CREATED"
    version = image | {"image_version": aws("list-microvm-image-versions", **image)["items"][0]["imageVersion"]}
    assert aws("get-microvm-image-version", **version)["state"] == "SUCCESSFUL"
    build = aws("list-microvm-image-builds", **version)["items"][0]["buildId"]
    assert aws("get-microvm-image-build", **version, build_id=build)["buildState"] == "SUCCESSFUL"
    aws("tag-resource", resource=kitchen_image, tags={"by": "aws"})
    assert aws("list-tags", resource=kitchen_image)["Tags"]["by"] == "aws"
    aws("untag-resource", resource=kitchen_image, tag_keys=["by"])
    vm = aws(
        "run-microvm", **image, ingress_network_connectors=[CONNECTOR + "HTTP_INGRESS", CONNECTOR + "SHELL_INGRESS"],
        idle_policy={"maxIdleDurationSeconds": 600, "suspendedDurationSeconds": 600, "autoResumeEnabled": True},
    )["microvmId"]
    one = dict(microvm_identifier=vm)
    state = lambda: aws("get-microvm", **one)["state"]
    eventually("it to run", lambda: state() == "RUNNING", within=120)
    assert vm in [item["microvmId"] for item in aws("list-microvms", **image)["items"]]
    for minted in (aws("create-microvm-auth-token", **one, expiration_in_minutes="5", allowed_ports=[{"port": 8080}]),
                   aws("create-microvm-shell-auth-token", **one, expiration_in_minutes="5")):
        node.minted.extend(minted["authToken"].values())
        assert list(minted["authToken"]) == ["X-aws-proxy-auth"]
    aws("suspend-microvm", **one)
    eventually("it to sleep", lambda: state() == "SUSPENDED", within=60)
    aws("resume-microvm", **one)
    eventually("it to run again", lambda: state() == "RUNNING", within=120)
    aws("terminate-microvm", **one)
    eventually("its end", lambda: state() == "TERMINATED", within=60)
    assert aws.done == {command(name) for name in MODEL.operation_names} - CHANGES_OF_IMAGES


CHANGES_OF_IMAGES = {"create-microvm-image", "update-microvm-image", "update-microvm-image-version", "delete-microvm-image-version", "delete-microvm-image"}


def test_images_are_made_changed_and_deleted_by_the_aws_command(aws):
    """One that cannot be built is as good for that as one that can."""
    making = dict(base_image_arn=BASE, build_role_arn=images.ROLE, code_artifact={"uri": "s3://no-bucket/no.zip"})
    spare = aws("create-microvm-image", name="spare", **making, description="nothing")["imageArn"]
    settled = lambda: not aws("get-microvm-image", image_identifier=spare)["state"].endswith("ING")
    eventually("the build to fail", settled, within=60)
    aws("update-microvm-image", image_identifier=spare, **making)
    eventually("the build to fail again", settled, within=60)
    aws("update-microvm-image-version", image_identifier=spare, image_version="1.0", status="INACTIVE")
    aws("delete-microvm-image-version", image_identifier=spare, image_version="1.0")
    eventually("the version to be gone", settled, within=60)
    aws("delete-microvm-image", image_identifier=spare)
    eventually("the image to be gone", lambda: aws.run("get-microvm-image", image_identifier=spare)[0] != 0, within=60)
    assert aws.done >= CHANGES_OF_IMAGES


@pytest.mark.parametrize("operation, options, said", [
    ("run-microvm", {"image_identifier": NOTHING}, f"(ResourceNotFoundException) when calling the RunMicrovm operation: MicroVMImage not found for MicroVMImageID: {NOTHING}"),
    ("get-microvm", {"microvm_identifier": NOBODY}, f"(ResourceNotFoundException) when calling the GetMicrovm operation: MicroVM not found: {NOBODY}"),
    ("suspend-microvm", {"microvm_identifier": NOBODY}, "(ResourceNotFoundException)"),
    ("resume-microvm", {"microvm_identifier": NOBODY}, "(ResourceNotFoundException)"),
    ("terminate-microvm", {"microvm_identifier": NOBODY}, "(ResourceNotFoundException)"),
    ("create-microvm-auth-token", {"microvm_identifier": NOBODY, "expiration_in_minutes": "5", "allowed_ports": [{"port": 1}]}, "(ResourceNotFoundException)"),
    ("create-microvm-auth-token", {"microvm_identifier": NOBODY, "expiration_in_minutes": "61", "allowed_ports": [{"port": 1}]}, "ExpirationMinutes 61 exceeded max allowed of 60."),
    ("create-microvm-shell-auth-token", {"microvm_identifier": NOBODY, "expiration_in_minutes": "5"}, "(ResourceNotFoundException)"),
    ("list-microvms", {"image_identifier": "arn:aws:s3:::bucket"}, "(ValidationException)"),
    ("create-microvm-image", {"name": "new", "base_image_arn": BASE, "build_role_arn": images.ROLE, "code_artifact": {"uri": "https://x"}}, "CodeArtifact URI must be a valid S3 URI"),
    ("create-microvm-image", {"name": "new", "base_image_arn": NOTHING, "build_role_arn": images.ROLE, "code_artifact": {"uri": "s3://a-b/c"}}, "No managed MicroVM Image with arn"),
    ("get-microvm-image", {"image_identifier": NOTHING}, "(ResourceNotFoundException)"),
    ("get-microvm-image", {"image_identifier": NOTHING.replace("us-east-1", "eu-west-1")}, "(AccessDeniedException)"),
    ("update-microvm-image", {"image_identifier": NOTHING, "base_image_arn": BASE, "build_role_arn": images.ROLE, "code_artifact": {"uri": "s3://a-b/c"}}, "(ResourceNotFoundException)"),
    ("delete-microvm-image", {"image_identifier": NOTHING}, "(ResourceNotFoundException)"),
    ("list-microvm-image-versions", {"image_identifier": NOTHING}, "(ResourceNotFoundException)"),
    ("get-microvm-image-version", {"image_identifier": NOTHING, "image_version": "1.0"}, "(ResourceNotFoundException)"),
    ("update-microvm-image-version", {"image_identifier": NOTHING, "image_version": "1.0", "status": "INACTIVE"}, "(ResourceNotFoundException)"),
    ("delete-microvm-image-version", {"image_identifier": NOTHING, "image_version": "1.0"}, "(ResourceNotFoundException)"),
    ("list-microvm-image-builds", {"image_identifier": NOTHING, "image_version": "1.0"}, "(ResourceNotFoundException)"),
    ("get-microvm-image-build", {"image_identifier": NOTHING, "image_version": "1.0", "build_id": "b"}, "(ResourceNotFoundException)"),
    ("list-managed-microvm-image-versions", {"image_identifier": NOTHING}, "(ResourceNotFoundException)"),
    ("list-tags", {"resource": NOTHING}, "(ResourceNotFoundException)"),
    ("tag-resource", {"resource": NOTHING, "tags": {"aws:a": "b"}}, "(ResourceNotFoundException)"),
    ("untag-resource", {"resource": NOTHING, "tag_keys": ["aws:a"]}, "(InvalidParameterValueException)"),
])
def test_what_is_not_right_is_refused_in_aws_words(aws, operation, options, said):
    code, _, complaint = aws.run(operation, **options)
    assert code != 0 and said in complaint, f"{code} {complaint}"
    assert "InternalServerException" not in complaint and "Traceback" not in complaint, complaint


def at_once(count, call):
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        return list(pool.map(call, range(count)))


def test_callers_at_the_same_time(node, kitchen_image, run):
    client = node.client()
    answers = at_once(20, lambda _: client.run_microvm(imageIdentifier=kitchen_image, clientToken="all at once"))
    assert len({answer["microvmId"] for answer in answers}) == 1, answers
    vm = answers[0]["microvmId"]
    try:
        at_once(20, lambda n: client.tag_resource(Resource=kitchen_image, Tags={f"at-once-{n}": "x"}))
        assert {f"at-once-{n}" for n in range(20)} <= set(client.list_tags(Resource=kitchen_image)["Tags"])
        at_once(20, lambda n: client.untag_resource(Resource=kitchen_image, TagKeys=[f"at-once-{n}"]))
        assert not [key for key in client.list_tags(Resource=kitchen_image)["Tags"] if key.startswith("at-once")]
        minted = at_once(40, lambda _: client.create_microvm_auth_token(microvmIdentifier=vm, expirationInMinutes=5, allowedPorts=[{"port": 8080}]))
        node.minted.extend(token["authToken"]["X-aws-proxy-auth"] for token in minted)
        assert len({token["authToken"]["X-aws-proxy-auth"] for token in minted}) == 40
    finally:
        at_once(5, lambda _: client.terminate_microvm(microvmIdentifier=vm))
    # The same token for something else, by all of them: nobody gets a microVM.
    def conflict(_):
        with pytest.raises(ClientError) as refused:
            client.run_microvm(imageIdentifier=kitchen_image, clientToken="all at once", maximumDurationInSeconds=60)
        return refused.value.response["Error"]["Code"]

    assert set(at_once(10, conflict)) == {"ConflictException"}


def test_without_ingress_there_is_no_token_and_the_endpoint_refuses_everybody(node, kitchen_image, kitchen):
    closed = Microvm.run(node, kitchen_image, ingressNetworkConnectors=[CONNECTOR + "NO_INGRESS"], wait=False)
    try:
        with pytest.raises(ClientError, match="requires HTTP_INGRESS"):
            closed.token()
        with httpx.Client(verify=clients.tls(node), trust_env=False) as client:
            for headers in ({}, {"X-aws-proxy-auth": kitchen.token()}):
                assert client.get(closed.url, headers=headers).status_code == 403
    finally:
        closed.terminate()
