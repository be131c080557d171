"""Inputs that nobody thought of: schemathesis over an OpenAPI document that is made of botocore's model.

Whatever is sent, the node answers with a status that the operation declares and a body of AWS's model to the last member, and
never with a fault of its own. A node of its own, without rates; the one image on it cannot be built.
"""
import json

import hypothesis
import pytest
import requests
import schemathesis
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from schemathesis import GenerationMode, checks
from schemathesis.specs.openapi import checks as openapi_checks

from harness import aws_model, images, openapi
from harness.node import Node

MODEL = aws_model.model()
ARN = "arn:aws:lambda:us-east-1:000000000000:microvm-image:of-schemathesis"
KNOWN = {
    "imageIdentifier": [ARN, "arn:aws:lambda:us-east-1:aws:microvm-image:al2023-1"], "Resource": [ARN], "imageVersion": ["1.0", "1"],
    "microvmIdentifier": ["microvm-00000000-0000-4000-8000-000000000000"],
}
# By kind: as many as find something new for each operation and leave the whole under a minute.
EXAMPLES = {GenerationMode.POSITIVE: 8, GenerationMode.NEGATIVE: 5}
RATES = ("run", "suspend", "resume", "terminate", "get_microvm", "list_microvms", "auth_token", "shell_auth_token", "image_changes", "others")


class Signed(requests.auth.AuthBase):
    """As botocore signs what it sends itself."""

    def __init__(self, node):
        environment = node.environment
        self.credentials = Credentials(environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"])
        self.region = environment["AWS_REGION"]

    def __call__(self, prepared):
        kept = {name: value for name, value in prepared.headers.items() if name.lower() == "content-type"}
        request = AWSRequest(prepared.method, prepared.url, data=prepared.body or b"", headers=kept)
        SigV4Auth(self.credentials, "lambda", self.region).add_auth(request)
        prepared.headers.update(dict(request.headers.items()))
        return prepared


@pytest.fixture(scope="module")
def unlimited(run_dir):
    with Node(run_dir / "unlimited", api_settings="[api.rates]\n" + "".join(f"{rate}_per_second = 0\n" for rate in RATES)) as node:
        yield node


@pytest.fixture(scope="module")
def schema(unlimited):
    return schemathesis.openapi.from_dict(openapi.document(f"http://{unlimited.api}", **KNOWN))


@pytest.fixture(scope="module")
def session(unlimited):
    with requests.Session() as session:
        session.trust_env = False
        session.auth = Signed(unlimited)
        yield session


@pytest.fixture
def an_image(unlimited):
    """There is one, also after DeleteMicrovmImage; its build fails, because there is nothing to build."""
    try:
        unlimited.client().create_microvm_image(
            name=ARN.rsplit(":", 1)[1], baseImageArn=images.base_image_arn("us-east-1"), buildRoleArn=images.ROLE, codeArtifact={"uri": "s3://no-bucket/no.zip"},
        )
    except ClientError as exists:
        assert "already exists" in str(exists), exists


@pytest.mark.parametrize("mode", EXAMPLES, ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", MODEL.operation_names)
def test_whatever_is_sent_the_answer_is_one_of_the_model(schema, session, an_image, unlimited, name, mode):
    operation = MODEL.operation_model(name)
    seen = set()

    @hypothesis.given(case=schema.find_operation_by_id(name).as_strategy(generation_mode=mode))
    @hypothesis.settings(
        max_examples=EXAMPLES[mode], deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck),
        # A failure is shown as it was met; making it small would take as long as all tests together.
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    def check(case):
        answer = case.call(base_url=f"http://{unlimited.api}", session=session)
        if answer.status_code == 414:
            assert len(answer.request.url) > 60_000, "HTTP itself refuses an address of more than 64 KiB, and no other"
            return
        case.validate_response(answer, checks=[
            checks.not_a_server_error, openapi_checks.status_code_conformance, openapi_checks.content_type_conformance,
            openapi_checks.response_schema_conformance,
        ])
        headers = {name.lower(): values[0] for name, values in answer.headers.items()}
        seen.add(answer.status_code)
        # A path that the examples have bent is another operation's, or none's.
        if answer.status_code != 404 or headers.get("x-amzn-errortype") != "UnknownOperationException":
            wrong = aws_model.surprises(operation, answer.status_code, headers, answer.content)
            assert not wrong, f"{answer.status_code} {answer.content[:1000]!r}: {'; '.join(wrong)}"

    check()
    assert seen - {403}, f"only {seen}: the requests do not get past the signature"
    assert "panicked" not in unlimited.log.read_text()
