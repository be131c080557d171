"""The control API against botocore's model: every constraint of every input is told in AWS's words, every answer is one of it.

botocore checks inputs before it sends them, so that is switched off; what it reads is checked by harness/aws_model.py to
the last member.
"""
import json
import re

import pytest
from botocore.exceptions import ClientError

from harness import aws_model, images
from harness.microvm import RUNNING_WITHIN
from harness.waiting import eventually

MODEL = aws_model.model()
# Values of this node, where the model's is another one (harness/node.py sets it).
OURS = {"idlePolicy.maxIdleDurationSeconds": 1}
BAD_TEXTS = ["a b", "<", "a:b", ":*", "x" * 20, "é!"]
GOOD_TEXTS = {
    "RoleArn": "arn:aws:iam::123456789012:role/r", "KmsKeyIdentifier": "alias/a",
    "TaggableResource": "arn:aws:lambda:us-east-1:000000000000:microvm-image:nothing",
}


def good(shape):
    """The least value that fits."""
    limits, kind = shape.metadata, shape.type_name
    if kind == "string":
        return shape.enum[0] if shape.enum else GOOD_TEXTS.get(shape.name) or "a" * limits.get("min", 1)
    if kind in ("integer", "long"):
        return limits.get("min", 512)
    if kind == "boolean":
        return True
    if kind == "list":
        return [good(shape.member)] * limits.get("min", 0)
    if kind == "map":
        return {}
    names = list(shape.required_members) or (list(shape.members)[:1] if limits.get("union") else [])
    return {name: good(shape.members[name]) for name in names}


def violations(shape, path):
    """(value, path, rule) of every constraint in a shape: the value breaks the one at that path."""
    limits, kind = shape.metadata, shape.type_name
    if kind == "string":
        if limits.get("min"):
            yield "", path, f"have length greater than or equal to {limits['min']}"
        if limits.get("max"):
            yield "x" * (limits["max"] + 1), path, f"have length less than or equal to {limits['max']}"
        if limits.get("pattern"):
            # Python has no \p; the model's classes are letters, blanks and digits of all scripts.
            pattern = re.compile(limits["pattern"].replace(r"\p{L}\p{Z}\p{N}", r"\w "))
            fits = lambda text: not pattern.fullmatch(text) and limits.get("min", 0) <= len(text) <= limits["max"]
            yield next(text for text in BAD_TEXTS if fits(text)), path, f"satisfy regular expression pattern: {limits['pattern']}"
        if shape.enum:
            yield "NONE_OF_THEM", path, f"satisfy enum value set: [{', '.join(shape.enum)}]"
    elif kind in ("integer", "long"):
        least = OURS.get(path, limits.get("min"))
        if least is not None:
            yield least - 1, path, f"have value greater than or equal to {least}"
        if limits.get("max"):
            yield limits["max"] + 1, path, f"have value less than or equal to {limits['max']}"
    elif kind == "list":
        if limits.get("min"):
            yield [], path, f"have length greater than or equal to {limits['min']}"
        if limits.get("max"):
            yield [good(shape.member)] * (limits["max"] + 1), path, f"have length less than or equal to {limits['max']}"
        for value, where, rule in violations(shape.member, f"{path}.1.member"):
            yield [value], where, rule
    elif kind == "map":
        if limits.get("max"):
            yield {f"k{n}": good(shape.value) for n in range(limits["max"] + 1)}, path, f"have length less than or equal to {limits['max']}"
        for value, where, rule in violations(shape.key, f"{path}.key"):
            yield {value: good(shape.value)}, where, rule
        for value, where, rule in violations(shape.value, f"{path}.k.member"):
            yield {"k": value}, where, rule
    elif kind == "structure":
        if limits.get("union"):
            yield {}, path, "have exactly one member set"
        base = {} if limits.get("union") else good(shape)
        for name, member in shape.members.items():
            where = f"{path}.{name}".lstrip(".")
            if name in shape.required_members:
                yield {key: value for key, value in base.items() if key != name}, where, "not be null"
            for value, inner, rule in violations(member, where):
                yield base | {name: value}, inner, rule


def cases(operation):
    shape = operation.input_shape
    in_path = {name for name, member in shape.members.items() if member.serialization.get("location") == "uri"}
    for request, path, rule in violations(shape, ""):
        # Without a label it is another path; botocore sends none.
        if all(request.get(name) for name in in_path):
            yield request, path, rule


@pytest.fixture(scope="module")
def client(node):
    # Some operations are called more often than the node lets a key do it; then botocore waits.
    return node.fresh_client(parameter_validation=False, retries={"mode": "standard", "total_max_attempts": 10})


def call(client, operation, request):
    method = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation.name).lower()
    return getattr(client, method)(**request)


@pytest.mark.parametrize("name", MODEL.operation_names)
def test_every_constraint_of_the_model_is_told_in_its_words(client, name):
    operation = MODEL.operation_model(name)
    tried = 0
    for request, path, rule in cases(operation):
        with pytest.raises(ClientError) as refused:
            call(client, operation, request)
        answer = refused.value.response
        said = answer["Error"].get("Message") or ""
        shown = {key: str(value)[:80] for key, value in request.items()}
        assert (answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]) == (400, "ValidationException"), f"{shown}: {answer}"
        assert re.match(r"\d+ validation errors? detected: Value", said), f"{shown}: {said}"
        assert f"at '{path}' failed to satisfy constraint: Member must {rule}" in said, f"{path} must {rule}; {shown} was told: {said}"
        tried += 1
    assert tried or not any(member.metadata for member in operation.input_shape.members.values()), f"{name} has constraints, and none was tried"


def reaches(client, vm, state):
    eventually(f"{vm} to be {state}", lambda: client.get_microvm(microvmIdentifier=vm)["state"] == state, within=RUNNING_WITHIN)


def test_the_strict_reader_notices():
    """What harness/aws_model.py lets pass is worth as much as what it does not."""
    operation, headers = MODEL.operation_model("ListMicrovms"), {"content-type": "application/json", "x-amzn-requestid": "x"}
    item = {"microvmId": "microvm-1", "state": "RUNNING", "imageArn": GOOD_TEXTS["TaggableResource"], "imageVersion": "1.0", "startedAt": 1.5}
    read = lambda body, status=200, **more: aws_model.surprises(operation, status, headers | more, json.dumps(body).encode())
    assert read({"items": [item], "nextToken": None}) == []
    for wrong in ({"tags": {}}, {"state": "AWAKE"}, {"startedAt": 1}, {"imageVersion": None}, {"imageVersion": 1}, {"imageArn": "hello-is-a-name-only"}, {"microvmId": ""}):
        assert len(read({"items": [item | wrong], "nextToken": None})) == 1, wrong
    assert read({"items": None, "nextToken": None}) and read({"items": [], "more": 1}) and read({"items": []}, status=201)
    throttled = {"message": "x", "quotaCode": None, "serviceCode": None}
    assert read(throttled, 429, **{"x-amzn-errortype": "ThrottlingException", "retry-after": "1"}) == []
    assert read(throttled, 429, **{"x-amzn-errortype": "ThrottlingException"}), "without Retry-After"
    assert read(throttled, 400, **{"x-amzn-errortype": "ThrottlingException", "retry-after": "1"}), "with another status"
    assert read({"message": "x"}, 409, **{"x-amzn-errortype": "ConflictException"}), "not declared"
    assert read({"message": "x", "Type": "User"}, 400, **{"x-amzn-errortype": "ValidationException"}), "a member too many"
    assert read({"message": "x"}, 400), "without a type"


def test_what_must_not_be_seen_is_not_repeated(client):
    secret = "s3cr3t" * 1000
    for method, request in [
        (client.run_microvm, {"imageIdentifier": "a", "runHookPayload": secret}),
        (client.create_microvm_image, {"name": "a", "environmentVariables": {"A": secret}}),
    ]:
        with pytest.raises(ClientError) as refused:
            method(**request)
        assert "s3cr3t" not in str(refused.value.response), refused.value.response


def test_the_life_of_an_image_and_a_microvm_has_only_answers_of_the_model(node, kitchen_image):
    """Each operation that works, and each refusal on the way, read by a client that is strict."""
    seen = []
    client = aws_model.watch(node.fresh_client(), seen)
    arn = client.get_microvm_image(imageIdentifier=kitchen_image)["imageArn"]
    version = client.list_microvm_image_versions(imageIdentifier=arn)["items"][0]["imageVersion"]
    client.get_microvm_image_version(imageIdentifier=arn, imageVersion=version)
    build = client.list_microvm_image_builds(imageIdentifier=arn, imageVersion=version)["items"][0]["buildId"]
    client.get_microvm_image_build(imageIdentifier=arn, imageVersion=version, buildId=build)
    base = client.list_managed_microvm_images()["items"][0]["imageArn"]
    client.list_managed_microvm_image_versions(imageIdentifier=base)
    client.tag_resource(Resource=arn, Tags={"team": "a", "ä b": "c/d"})
    assert client.list_tags(Resource=arn)["Tags"].items() >= {"team": "a", "ä b": "c/d"}.items()
    assert client.get_microvm_image(imageIdentifier=arn)["tags"]["team"] == "a"
    assert any(item["imageArn"] == arn for page in client.get_paginator("list_microvm_images").paginate(maxResults=1) for item in page["items"])
    client.untag_resource(Resource=arn, TagKeys=["team", "ä b"])
    assert "team" not in client.list_tags(Resource=arn)["Tags"]
    run = client.run_microvm(
        imageIdentifier=arn, clientToken="strict", executionRoleArn=images.ROLE, maximumDurationInSeconds=600,
        idlePolicy={"maxIdleDurationSeconds": 600, "suspendedDurationSeconds": 600, "autoResumeEnabled": True},
    )
    vm = run["microvmId"]
    try:
        assert client.run_microvm(
            imageIdentifier=arn, clientToken="strict", executionRoleArn=images.ROLE, maximumDurationInSeconds=600,
            idlePolicy={"maxIdleDurationSeconds": 600, "suspendedDurationSeconds": 600, "autoResumeEnabled": True},
        )["microvmId"] == vm
        wait = lambda state: reaches(client, vm, state)
        wait("RUNNING")
        client.get_microvm(microvmIdentifier=vm)
        node.minted.extend(client.create_microvm_auth_token(microvmIdentifier=vm, expirationInMinutes=1, allowedPorts=[{"allPorts": {}}])["authToken"].values())
        client.suspend_microvm(microvmIdentifier=vm)
        wait("SUSPENDED")
        client.get_microvm(microvmIdentifier=vm)
        client.resume_microvm(microvmIdentifier=vm)
        wait("RUNNING")
        assert any(item["microvmId"] == vm for page in client.get_paginator("list_microvms").paginate(imageIdentifier=arn, maxResults=2) for item in page["items"])
    finally:
        client.terminate_microvm(microvmIdentifier=vm)
    reaches(client, vm, "TERMINATED")
    client.get_microvm(microvmIdentifier=vm)
    refusals = [
        (client.suspend_microvm, {"microvmIdentifier": vm}, "ValidationException"),
        (client.run_microvm, {"imageIdentifier": arn, "clientToken": "strict"}, "ConflictException"),
        (client.get_microvm, {"microvmIdentifier": "microvm-00000000-0000-4000-8000-000000000000"}, "ResourceNotFoundException"),
        (client.get_microvm, {"microvmIdentifier": "ours-is-another-form"}, "ResourceNotFoundException"),
        (client.get_microvm_image, {"imageIdentifier": arn.replace("microvm-image:", "microvm-image/")}, "AccessDeniedException"),
        (client.list_microvms, {"nextToken": "e30="}, "ValidationException"),
        (client.list_tags, {"Resource": arn.replace(":microvm-image:", ":function:")}, "ResourceNotFoundException"),
        (client.tag_resource, {"Resource": arn, "Tags": {"aws:x": ""}}, "InvalidParameterValueException"),
        (client.create_microvm_image, {"name": "kitchen-sink", "baseImageArn": base, "buildRoleArn": images.ROLE, "codeArtifact": {"uri": "s3://artifacts/x.zip"}}, "ValidationException"),
    ]
    for method, request, kind in refusals:
        with pytest.raises(ClientError) as refused:
            method(**request)
        assert refused.value.response["Error"]["Code"] == kind, refused.value.response
    assert {name for name, status in seen if status < 300} >= {
        "RunMicrovm", "GetMicrovm", "ListMicrovms", "SuspendMicrovm", "ResumeMicrovm", "TerminateMicrovm", "CreateMicrovmAuthToken",
        "GetMicrovmImage", "ListMicrovmImages", "GetMicrovmImageVersion", "ListMicrovmImageVersions", "GetMicrovmImageBuild",
        "ListMicrovmImageBuilds", "ListManagedMicrovmImages", "ListManagedMicrovmImageVersions", "ListTags", "TagResource", "UntagResource",
    }


def test_the_changes_of_an_image_have_only_answers_of_the_model(node):
    """Of one that cannot be built: what is told of it has the same members."""
    seen = []
    client = aws_model.watch(node.fresh_client(), seen)
    making = dict(baseImageArn=images.base_image_arn("us-east-1"), buildRoleArn=images.ROLE, codeArtifact={"uri": "s3://no-bucket/no.zip"})
    more = dict(
        description="two\nlines", environmentVariables={"A": "b"}, resources=[{"minimumMemoryInMiB": 512}], kmsKeyIdentifier="alias/a",
        logging={"cloudWatch": {"logGroup": "/a"}}, cpuConfigurations=[{"architecture": "X86_64"}], additionalOsCapabilities=["ALL"],
    )
    arn = client.create_microvm_image(name="strictly-changed", tags={"a": "b"}, clientToken="strict", **making, **more)["imageArn"]
    settled = lambda: not client.get_microvm_image(imageIdentifier=arn)["state"].endswith("ING")
    eventually("the build to fail", settled, within=60)
    assert client.update_microvm_image(imageIdentifier=arn, **making)["imageVersion"] == "2.0"
    eventually("the build to fail again", settled, within=60)
    versions = client.list_microvm_image_versions(imageIdentifier=arn)["items"]
    assert {version["imageVersion"] for version in versions} == {"1.0", "2.0"}
    for version in versions:
        client.get_microvm_image_version(imageIdentifier=arn, imageVersion=version["imageVersion"])
        for build in client.list_microvm_image_builds(imageIdentifier=arn, imageVersion=version["imageVersion"])["items"]:
            client.get_microvm_image_build(imageIdentifier=arn, imageVersion=version["imageVersion"], buildId=build["buildId"])
    client.update_microvm_image_version(imageIdentifier=arn, imageVersion="1.0", status="INACTIVE")
    client.delete_microvm_image_version(imageIdentifier=arn, imageVersion="1.0")
    eventually("the version to be gone", settled, within=60)
    client.delete_microvm_image(imageIdentifier=arn)

    def gone():
        try:
            client.get_microvm_image(imageIdentifier=arn)
        except ClientError as refused:
            return refused.response["Error"]["Code"] == "ResourceNotFoundException"

    eventually("the image to be gone", gone, within=60)
    assert {"CreateMicrovmImage", "UpdateMicrovmImage", "UpdateMicrovmImageVersion", "DeleteMicrovmImageVersion", "DeleteMicrovmImage"} \
        <= {name for name, status in seen if status < 300}


def test_the_aws_command_tags_an_image(node, kitchen_image):
    resource = ("--resource", kitchen_image)
    node.aws("lambda-microvms", "tag-resource", *resource, "--tags", "owner=me,stage=test")
    assert node.aws("lambda-microvms", "list-tags", *resource)["Tags"].items() >= {"owner": "me", "stage": "test"}.items()
    node.aws("lambda-microvms", "untag-resource", *resource, "--tag-keys", "owner", "stage")
    assert not {"owner", "stage"} & set(node.aws("lambda-microvms", "list-tags", *resource)["Tags"])
    refused = node.shell("aws lambda-microvms list-tags --resource microvm-00000000-0000-4000-8000-000000000000")
    assert refused.returncode != 0 and "ValidationException" in refused.stderr, refused.stderr
