"""The life of an image and a microVM by SDKs that are not boto3: the one for JavaScript, and the one for Rust.

Each is told nothing but the variables of `dormouse env`. What each made of the answers is judged here.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import images

HERE = Path(__file__).parent
# An image build and a life.
WITHIN = 500
# A first build, on two cores that others use as well.
BUILT_WITHIN = 900


def put(node, name):
    """The article's app in S3: its URI."""
    s3 = node.client("s3")
    if "sdks" not in [bucket["Name"] for bucket in s3.list_buckets().get("Buckets", [])]:
        s3.create_bucket(Bucket="sdks")
    s3.put_object(Bucket="sdks", Key=f"{name}.zip", Body=images.zip_of(images.ARTICLE_APP))
    return f"s3://sdks/{name}.zip"


def judge(node, name, told):
    node.minted.extend(told["token"]["authToken"].values())
    image, ran = told["image"], told["ran"]["microvmId"]
    assert told["created"]["state"] == "CREATING" and told["created"]["imageVersion"] == "1.0", told["created"]
    assert (image["state"], image["name"], image["latestActiveImageVersion"]) == ("CREATED", name, "1.0"), image
    assert told["ran"]["state"] in ("PENDING", "RUNNING")
    for member, state in (("running", "RUNNING"), ("suspended", "SUSPENDED"), ("resumed", "RUNNING"), ("terminated", "TERMINATED")):
        assert (told[member]["microvmId"], told[member]["state"]) == (ran, state), told[member]
    assert told["terminated"]["stateReason"] == "Success."
    assert list(told["token"]["authToken"]) == ["X-aws-proxy-auth"]
    assert ran in told["listed"] and [item["microvmId"] for item in told["one"]] == [ran]
    refused = told["refused"]
    assert refused["known"] and refused["status"] == 404 and "MicroVM not found" in refused["message"], refused


def lead(node, name, command):
    """Starts a life; what it says comes from `communicate`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | node.environment
    return subprocess.Popen([*command, name, put(node, name)], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def rust_program():
    """The program in rust-sdk/, built: about two minutes the first time (its own target directory keeps it)."""
    if not shutil.which("cargo"):
        pytest.skip("there is no cargo to build the client of the AWS SDK for Rust with")
    target = Path(os.environ.get("DORMOUSE_RUST_SDK_TARGET") or Path.home() / ".cache" / "dormouse" / "target-rust-sdk")
    done = subprocess.run(
        ["cargo", "build", "--locked", "--manifest-path", HERE / "rust-sdk" / "Cargo.toml"],
        env=os.environ | {"CARGO_TARGET_DIR": str(target)}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=BUILT_WITHIN,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return target / "debug" / "rust-sdk"


def test_the_sdks_for_javascript_and_rust(node, rust_program):
    """Both at the same time: each waits for an image build most of the time."""
    # The Node.js that came with the Python clients, as in test_jwe_libraries.py.
    program = Path(sys.executable).parent / "node"
    lives = {
        "by-javascript": [program if program.exists() else "node", HERE / "javascript" / "life.js"],
        "by-rust": [rust_program],
    }
    led = {name: lead(node, name, command) for name, command in lives.items()}
    for name, process in led.items():
        try:
            said, error = process.communicate(timeout=WITHIN)
        finally:
            process.kill()
        assert process.returncode == 0, f"{name}: {error}"
        judge(node, name, json.loads(said))
