"""Lifecycle hooks (aws-behaviour §4): who is told what, in which order, and what becomes of a microVM whose app does not agree."""
import json
import time

import pytest
import websockets.sync.client
from botocore.exceptions import ClientError

from harness import clients, images
from harness.microvm import PATIENT, Microvm
from harness.waiting import eventually

ALL = {
    "port": 9000,
    "microvmImageHooks": {"ready": "ENABLED", "readyTimeoutInSeconds": 60, "validate": "ENABLED", "validateTimeoutInSeconds": 60},
    "microvmHooks": {
        "run": "ENABLED", "runTimeoutInSeconds": 10, "resume": "ENABLED", "resumeTimeoutInSeconds": 2,
        "suspend": "ENABLED", "suspendTimeoutInSeconds": 10, "terminate": "ENABLED", "terminateTimeoutInSeconds": 10,
    },
}
ADVICE = "Please check your hook endpoint and application logs for more details."


@pytest.fixture(scope="module")
def builds(node):
    """Images of the app at once: one that comes to be, and three whose hooks do not let it."""
    slow = ALL | {"microvmImageHooks": {"ready": "ENABLED", "readyTimeoutInSeconds": 3}, "microvmHooks": {}}
    return {
        "good": images.start_build(node, "hooks", images.app("hooks"), hooks=ALL, environmentVariables={"READY": "503,503,200", "VALIDATE": "503,200"}),
        "broken": images.start_build(node, "hooks-broken", images.app("hooks"), hooks=ALL, environmentVariables={"READY": "500,200"}),
        "invalid": images.start_build(node, "hooks-invalid", images.app("hooks"), hooks=ALL, environmentVariables={"VALIDATE": "500"}),
        "never": images.start_build(node, "hooks-never", images.app("hooks"), hooks=slow, environmentVariables={"READY": "503"}),
    }


@pytest.fixture(scope="module")
def image(node, builds):
    return images.finish_build(node, builds["good"])


@pytest.fixture(scope="module")
def shared(node, image):
    """A microVM whose app is asked to sleep and to wake by more than one test, none of which leaves it broken."""
    return Microvm.run(node, image, runHookPayload='{"tenant": "ä"}')


def events(vm):
    with vm.http() as client:
        return client.get("/events").json()


def names(found):
    return [event["what"] for event in found]


def tell(vm, **rules):
    with vm.http() as client:
        assert client.post("/", json=rules).status_code == 200


def app_log(node, vm):
    return (node.data_dir / "microvms" / vm.id / "log" / "app.log").read_text()


# -- builds -----------------------------------------------------------------------------------------------------------


def test_a_build_waits_until_the_app_is_ready_and_asks_a_clone_whether_it_is_good(node, image, shared):
    seen = events(shared)
    ready = [event for event in seen if event["what"] == "ready answered"]
    assert [event["status"] for event in ready] == [503, 503, 200], "asked until it said 200, and the snapshot was taken after that"
    assert "validate" not in names(seen), "who is asked that is a clone, and is thrown away"
    log = (node.data_dir / "images" / "hooks" / "1.0" / "build.log").read_text()
    assert "The app's validate hook answered 200 on a clone" in log and "POST /aws/lambda-microvms/runtime/v1/validate 503" in log
    version = node.client().get_microvm_image_version(imageIdentifier=image, imageVersion="1.0")
    assert version["hooks"] == ALL, "the API shows what was asked for"


def test_a_hook_that_fails_or_never_agrees_fails_the_build_and_leaves_nothing(node, builds):
    with pytest.raises(images.BuildFailed, match=r"Ready hook check failed: the application returned a server error \(HTTP 5xx\) response"):
        images.finish_build(node, builds["broken"])
    with pytest.raises(images.BuildFailed, match=r"Ready hook invocation timed out after PT3S"):
        images.finish_build(node, builds["never"])
    with pytest.raises(images.BuildFailed, match=r"Validate hook check failed: the application returned a server error \(HTTP 5xx\) response"):
        images.finish_build(node, builds["invalid"])
    for name in ("hooks-broken", "hooks-never", "hooks-invalid"):
        snapshot = node.data_dir / "images" / name / "1.0" / "snapshot"
        assert not snapshot.exists()
        # No VMM waits ready for what will never run, or holds its memory file.
        eventually(f"no process of {name} to be left", lambda: not node.processes(of=snapshot), within=10)


# -- run --------------------------------------------------------------------------------------------------------------


def test_run_is_told_who_it_is_before_anything_else_reaches_it(shared):
    run = [event for event in events(shared) if event["what"] == "run"]
    assert len(run) == 1
    assert json.loads(run[0]["body"]) == {"microvmId": shared.id, "runHookPayload": '{"tenant": "ä"}'}, "the payload is wrapped, as a text"
    headers = {name.lower(): value for name, value in run[0]["headers"].items()}
    assert headers["host"] == "localhost:9000" and headers["content-type"] == "application/json" and headers["connection"] == "close"
    assert run[0]["path"] == "/aws/lambda-microvms/runtime/v1/run" and run[0]["version"] == "HTTP/1.1"


def test_requests_wait_for_run(run, image):
    vm = run(image, wait=False, runHookPayload='{"seconds": 3}')
    with vm.http() as client:
        assert client.get("/early").status_code == 200
    seen = [event for event in events(vm) if not event["what"].startswith(("ready", "validate"))]
    assert names(seen) == ["run", "run answered", "request"], "the request came first and was let through last"
    assert vm.state == "RUNNING"


def test_a_run_that_fails_ends_the_microvm_with_its_reason(node, run, image):
    vm = run(image, wait=False, runHookPayload='{"status": 400}')
    answer = vm.curl("--header", f"X-aws-proxy-auth: {vm.token()}")
    assert (answer.status, answer.text) == (502, "") and answer.headers.get("x-dormouse-reason"), answer
    vm.reaches("TERMINATED", within=60)
    assert vm.view()["stateReason"] == f"Run lifecycle hook returned HTTP status 400. {ADVICE}"


def test_a_payload_has_a_limit_of_bytes(node, run, image):
    vm = run(image, runHookPayload=json.dumps({"pad": ""})[:-2] + "x" * (4096 - 11) + '"}')
    assert len(json.loads(next(event for event in events(vm) if event["what"] == "run")["body"])["runHookPayload"]) == 4096
    for payload in ("x" * 4097, "ä" * 2049):
        with pytest.raises(ClientError, match="Value at 'runHookPayload' failed to satisfy constraint: Member must have length less than or equal to 4096"):
            node.client(parameter_validation=False).run_microvm(imageIdentifier=image, runHookPayload=payload)


# -- suspend and resume -----------------------------------------------------------------------------------------------


def test_a_sleep_and_a_wake_are_told_and_nothing_comes_before_the_wakes_answer(node, shared):
    before = len(events(shared))
    token = shared.token()
    with websockets.sync.client.connect(
        f"wss://{shared.endpoint}/ws", ssl=clients.tls(node), additional_headers={"X-aws-proxy-auth": token}, open_timeout=60, proxy=None,
    ) as socket:
        socket.send("awake")
        assert socket.recv(timeout=60) == "awake"
        shared.suspend()
        socket.send("while you slept")
        assert socket.recv(timeout=60) == "while you slept"
        shared.reaches("RUNNING", within=60)
        seen = events(shared)[before:]
    assert names(seen) == ["message", "suspend", "suspend answered", "resume", "resume answered", "message"]
    suspend, resume = [event for event in seen if event["what"] in ("suspend", "resume")]
    assert suspend["connection"] != resume["connection"], "a connection does not live through a freeze"
    for call in (suspend, resume):
        headers = {name.lower(): value for name, value in call["headers"].items()}
        assert call["body"] == "" and headers["content-length"] == "0" and headers["connection"] == "close"


def test_a_resume_that_fails_keeps_the_snapshot_and_the_next_request_tries_again(node, shared):
    with shared.http() as client:
        client.get("/before")
    tell(shared, until={"resume": [500, time.time() + 5]})
    shared.suspend()
    token = shared.token()
    answer = shared.curl("--header", f"X-aws-proxy-auth: {token}")
    assert (answer.status, answer.text) == (502, "") and answer.headers.get("x-dormouse-reason") == "wake-failed", answer
    view = shared.view()
    assert (view["state"], view["stateReason"]) == ("SUSPENDED", f"Resume lifecycle hook returned HTTP status 500. {ADVICE}")
    assert not node.processes(of=shared.id), "what did not agree is not left running"
    eventually("the app to agree to its wake", lambda: shared.curl("--header", f"X-aws-proxy-auth: {token}").status == 200, within=60)
    view = shared.view()
    assert (view["state"], view.get("stateReason")) == ("RUNNING", None)
    assert any(event.get("path") == "/before" for event in events(shared)), "its memory is what it was"


def test_a_resume_that_is_refused_loses_nothing(run, image):
    vm = run(image)
    tell(vm, deaf="asleep")
    vm.suspend()
    answer = vm.curl("--header", f"X-aws-proxy-auth: {vm.token()}")
    assert (answer.status, answer.headers.get("x-dormouse-reason")) == (502, "wake-failed"), answer
    view = vm.view()
    assert (view["state"], view["stateReason"]) == ("SUSPENDED", f"Resume lifecycle hook connection was refused. {ADVICE}")


def test_an_app_that_hears_no_hooks_any_more_runs_on(run, image):
    vm = run(image)
    tell(vm, deaf="now")
    # Nobody hears /suspend either: it runs on, and says why.
    vm.node.client().suspend_microvm(microvmIdentifier=vm.id)
    refused = f"Suspend lifecycle hook connection was refused. {ADVICE}"
    eventually("the refusal to be told", lambda: vm.view().get("stateReason") == refused, within=60)
    assert vm.state == "RUNNING"
    with vm.http() as client:
        assert client.get("/on").status_code == 200


def test_an_app_that_does_not_agree_to_sleep_runs_on(shared):
    tell(shared, answers={"suspend": [500, 200]})
    shared.node.client().suspend_microvm(microvmIdentifier=shared.id)
    reason = f"Suspend lifecycle hook returned HTTP status 500. {ADVICE}"
    eventually("the reason to be told", lambda: shared.view().get("stateReason") == reason, within=60)
    assert shared.state == "RUNNING"
    with shared.http() as client:
        assert client.get("/on").status_code == 200
    assert shared.suspend().view().get("stateReason") is None, "the next one agrees"
    shared.resume()


# -- the end ----------------------------------------------------------------------------------------------------------


def test_an_app_that_is_awake_is_told_of_its_end(node, run, image):
    vm = run(image)
    vm.terminate()
    assert vm.view()["stateReason"] == "Success."
    assert "POST /aws/lambda-microvms/runtime/v1/terminate 200" in app_log(node, vm)
