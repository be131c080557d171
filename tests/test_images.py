"""The life of an image by boto3 on a real node: versions, their status, deletion, and a node that dies in the middle.

These tests have a node of their own, which is killed; they build one image, update it, and use both.
"""
import concurrent.futures

import pytest
from botocore.exceptions import ClientError

from harness import images
from harness.microvm import Microvm
from harness.node import Node, free_addresses
from harness.waiting import StopWaiting, eventually

APP = images.answering('''
import os


def answer(_path):
    return "{} {} {}".format(open("/version").read().strip(), os.environ["AWS_LAMBDA_MICROVM_IMAGE_VERSION"], os.environ.get("ONE", "-")).encode()
''')
FROM = "FROM public.ecr.aws/lambda/microvms:al2023-minimal\n"
DOCKERFILE = FROM + "COPY app.py /app.py\nRUN echo {} >/version\nEXPOSE 8080\nCMD [\"python3\", \"/app.py\"]\n"
NAME = "life"
# A build that is sure to be under way when the node is killed.
ENDLESS = FROM + "RUN echo it-has-begun; sleep 1000\nCMD [\"true\"]\n"


@pytest.fixture(scope="module")
def third(run_dir):
    edge, api, admin = free_addresses(3)
    with Node(run_dir / "third", edge=edge, api=api, admin=admin) as node:
        yield node


def code(node, key, dockerfile):
    images.upload(node, key, images.zip_of(Dockerfile=dockerfile, **{"app.py": APP}))
    return {"uri": f"s3://{images.BUCKET}/{key}.zip"}


def request(node, key, dockerfile, **more):
    return {
        "codeArtifact": code(node, key, dockerfile), "buildRoleArn": images.ROLE,
        "baseImageArn": images.base_image_arn(node.client().meta.region_name),
        "resources": [{"minimumMemoryInMiB": images.MEMORY_MIB}],
    } | more


def state(node, image):
    return node.client().get_microvm_image(imageIdentifier=image)["state"]


def settled(node, image, wanted):
    def there():
        seen = state(node, image)
        if seen.endswith("_FAILED") and seen != wanted:
            raise StopWaiting(f"{image} should become {wanted} and is {seen}")
        return seen == wanted

    eventually(f"{image} to be {wanted}", there, within=images.BUILT_WITHIN, every=0.2)


def gone(node, image):
    """There is no such image any more."""
    def there():
        try:
            return not node.client().get_microvm_image(imageIdentifier=image)
        except ClientError as error:
            return error.response["Error"]["Code"] == "ResourceNotFoundException"

    eventually(f"{image} to be deleted", there, within=30)


def refused(call, kind, words, **arguments):
    with pytest.raises(ClientError) as told:
        call(**arguments)
    error = told.value.response["Error"]
    assert error["Code"] == kind and words in error["Message"], error


def said(vm):
    """What the app of a microVM answers: the word of its Dockerfile, the version of its image, the variable ONE."""
    with vm.http() as client:
        return client.get("/").content


def files_of(node, name):
    return sorted(path.name for path in (node.data_dir / "images" / name).iterdir())


@pytest.fixture(scope="module")
def image(third):
    """With version 1.0, which every test can run."""
    client = third.client()
    made = client.create_microvm_image(name=NAME, environmentVariables={"ONE": "1"}, tags={"team": "a"}, **request(third, "v1", DOCKERFILE.format("first")))
    assert (made["state"], made["imageVersion"]) == ("CREATING", "1.0")
    # What is under way is not deleted, updated or switched.
    arn = made["imageArn"]
    refused(client.delete_microvm_image, "ValidationException", "Cannot delete MicroVM image in its current state: CREATING", imageIdentifier=arn)
    refused(client.update_microvm_image, "ConflictException", "MicroVM Image is already in state: CREATING", imageIdentifier=arn, **request(third, "v1", DOCKERFILE))
    settled(third, arn, "CREATED")
    return arn


@pytest.fixture(scope="module")
def updated(third, image):
    """With version 2.0 beside it; the first one serves while it is built."""
    client = third.client()
    answer = client.update_microvm_image(imageIdentifier=image, **request(third, "v2", DOCKERFILE.format("second")))
    assert (answer["state"], answer["imageVersion"], answer["latestActiveImageVersion"]) == ("UPDATING", "2.0", "1.0")
    assert not answer.get("environmentVariables"), "what an update leaves out is gone"
    refused(client.update_microvm_image_version, "ConflictException", "MicroVM Image is already in state: UPDATING",
            imageIdentifier=image, imageVersion="1.0", status="INACTIVE")
    refused(client.delete_microvm_image, "ValidationException", "in its current state: UPDATING", imageIdentifier=image)
    meanwhile = Microvm.run(third, image)
    assert said(meanwhile) == b"first 1.0 1"
    meanwhile.terminate()
    settled(third, image, "UPDATED")
    return image


def test_an_update_is_a_new_version_beside_the_old_one(third, updated):
    client = third.client()
    assert [item["imageVersion"] for item in client.list_microvm_image_versions(imageIdentifier=updated)["items"]] == ["2.0", "1.0"]
    newest, pinned = Microvm.run(third, updated), Microvm.run(third, updated, imageVersion="1")
    assert (said(newest), said(pinned)) == (b"second 2.0 -", b"first 1.0 1")
    assert (newest.view()["imageVersion"], pinned.view()["imageVersion"]) == ("2.0", "1.0")
    refused(client.delete_microvm_image, "ValidationException", "Cannot delete microvm image with running microvms.", imageIdentifier=updated)
    refused(client.delete_microvm_image_version, "ValidationException", "with running microvms", imageIdentifier=updated, imageVersion="1.0")
    for vm in (newest, pinned):
        vm.terminate()
    build = client.list_microvm_image_builds(imageIdentifier=updated, imageVersion="2.0", architecture="X86_64")["items"][0]
    sizes = client.get_microvm_image_build(imageIdentifier=updated, imageVersion="2.0", buildId=build["buildId"])["snapshotBuild"]
    assert all(sizes[member] > 10 << 20 for member in ("memorySnapshotSizeInBytes", "diskSnapshotSizeInBytes", "codeInstallSizeInBytes")), sizes


def test_an_inactive_version_is_not_run(third, updated):
    client = third.client()
    off = client.update_microvm_image_version(imageIdentifier=updated, imageVersion="2.0", status="INACTIVE")
    assert (off["status"], off["state"]) == ("INACTIVE", "SUCCESSFUL")
    refused(client.run_microvm, "ResourceNotFoundException", f"No active version found for MicroVM image {updated} and version 2.0",
            imageIdentifier=updated, imageVersion="2.0")
    assert client.get_microvm_image(imageIdentifier=updated)["latestActiveImageVersion"] == "1.0"
    client.update_microvm_image_version(imageIdentifier=updated, imageVersion="1.0", status="INACTIVE")
    refused(client.run_microvm, "ResourceNotFoundException", f"No active version found for MicroVM image {updated}", imageIdentifier=updated)
    third.kill()
    third.start()
    client = third.client()
    assert [item["status"] for item in client.list_microvm_image_versions(imageIdentifier=updated)["items"]] == ["INACTIVE", "INACTIVE"]
    for version in ("1.0", "2.0"):
        client.update_microvm_image_version(imageIdentifier=updated, imageVersion=version, status="ACTIVE")
    assert client.get_microvm_image(imageIdentifier=updated)["latestActiveImageVersion"] == "2.0"


def test_of_concurrent_updates_one_goes_on_and_a_killed_node_leaves_none_of_it(third, updated):
    client = third.client(max_pool_connections=16)
    ask = request(third, "endless", ENDLESS)

    def update(_):
        try:
            return client.update_microvm_image(imageIdentifier=updated, **ask)["imageVersion"]
        except ClientError as error:
            return error.response["Error"]["Message"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        told = sorted(pool.map(update, range(8)))
    assert told == ["3.0"] + ["MicroVM Image is already in state: UPDATING"] * 7, told
    created = client.create_microvm_image(name="cut", **ask)["imageArn"]
    logs = [third.data_dir / "images" / name / version / "build.log" for name, version in ((NAME, "3.0"), ("cut", "1.0"))]
    eventually("both builds to have begun", lambda: all("it-has-begun" in log.read_text() for log in logs), within=120)

    third.kill()
    third.start()
    client = third.client()
    assert (state(third, updated), state(third, created)) == ("UPDATE_FAILED", "CREATE_FAILED")
    for arn, version in ((updated, "3.0"), (created, "1.0")):
        reason = client.list_microvm_image_builds(imageIdentifier=arn, imageVersion=version)["items"][0]["stateReason"]
        assert reason.startswith("INTERNAL_PLATFORM_ERROR: the node stopped"), reason
    for log in logs:
        assert sorted(path.name for path in log.parent.iterdir()) == ["build.log", "record.json"], "nothing else is left of it"
    assert not (third.data_dir / "images" / ".work").exists()
    eventually("the builds' processes to be gone", lambda: not [left for left in third.processes() if "buildah" in left[1]], within=10)
    assert client.get_microvm_image(imageIdentifier=updated)["latestActiveImageVersion"] == "2.0"

    # Both can go, and the name can be used again at once.
    assert client.delete_microvm_image_version(imageIdentifier=updated, imageVersion="3.0")["state"] == "DELETING"
    settled(third, updated, "UPDATED")
    assert client.delete_microvm_image(imageIdentifier=created)["state"] == "DELETING"
    gone(third, created)
    assert client.delete_microvm_image(imageIdentifier=created)["state"] == "DELETED"


def test_a_deletion_that_was_answered_is_done_whenever_the_node_dies(third, updated):
    """Killed at once after the answer: whatever had been done by then, the next start does the rest."""
    client = third.client()
    assert client.delete_microvm_image_version(imageIdentifier=updated, imageVersion="1.0")["state"] in ("DELETING", "DELETED")
    third.kill()
    third.start()
    client = third.client()
    assert [item["imageVersion"] for item in client.list_microvm_image_versions(imageIdentifier=updated)["items"]] == ["2.0"]
    assert "1.0" not in files_of(third, NAME)
    refused(client.delete_microvm_image_version, "ValidationException", "the last one", imageIdentifier=updated, imageVersion="2.0")
    vm = Microvm.run(third, updated)
    assert said(vm) == b"second 2.0 -", "the rest of the image works"
    vm.terminate()

    client.delete_microvm_image(imageIdentifier=updated)
    third.kill()
    third.start()
    gone(third, updated)
    assert not (third.data_dir / "images" / NAME).exists()
    eventually("its files to be gone", lambda: not list((third.data_dir / "images" / ".trash").iterdir()), within=30)
    assert third.client().list_microvm_images()["items"] == []


def test_what_is_wrong_is_refused_and_changes_nothing(third):
    client = third.client(parameter_validation=False)
    arn = f"arn:aws:lambda:{client.meta.region_name}:000000000000:microvm-image:none"
    ask = request(third, "v1", DOCKERFILE)
    for call, arguments in [
        (client.update_microvm_image, {"imageIdentifier": arn} | ask),
        (client.update_microvm_image_version, {"imageIdentifier": arn, "imageVersion": "1.0", "status": "ACTIVE"}),
        (client.delete_microvm_image_version, {"imageIdentifier": arn, "imageVersion": "1.0"}),
        (client.delete_microvm_image, {"imageIdentifier": arn}),
    ]:
        refused(call, "ResourceNotFoundException", "MicroVMImage not found", **arguments)
    refused(client.update_microvm_image_version, "ValidationException", "enum value set", imageIdentifier=arn, imageVersion="1.0", status="ON")
    refused(client.update_microvm_image, "ValidationException", "codeArtifact", imageIdentifier=arn, **(ask | {"codeArtifact": {}}))
    refused(client.delete_microvm_image, "ValidationException", "Invalid ARN format", imageIdentifier="a b")
    # What is not in the bucket fails the build, in AWS's words.
    for key, code_of in (("s3://artifacts/none.zip", "S3_NO_SUCH_KEY"), ("s3://no-such-bucket/none.zip", "S3_NO_SUCH_BUCKET")):
        made = client.create_microvm_image(name=code_of, **(ask | {"codeArtifact": {"uri": key}}))["imageArn"]
        with pytest.raises(images.BuildFailed) as failed:
            images.finish_build(third, made)
        assert code_of in str(failed.value)
        client.delete_microvm_image(imageIdentifier=made)
        gone(third, made)
