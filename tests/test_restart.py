"""The node is restarted, or dies, and comes back: nobody's microVM is lost, doubled or left without an owner.

These tests have a node of their own, on ports that stay the same, so that endpoints survive the restart.
"""
import subprocess
import time

import pytest

from harness import images
from harness.microvm import PATIENT, Microvm
from harness.node import Node, binary, free_addresses
from harness.waiting import eventually


@pytest.fixture(scope="module")
def second(run_dir):
    edge, api, admin = free_addresses(3)
    with Node(run_dir / "second", edge=edge, api=api, admin=admin) as node:
        yield node


@pytest.fixture(scope="module")
def image(second):
    return images.build(second, "hello-microvm-test", images.zip_of(images.ARTICLE_APP))


def end(node, how):
    code = node.stop() if how == "SIGTERM" else node.kill()
    assert code == (0 if how == "SIGTERM" else -9), f"{how}: the node ended with {code}:\n{node.log_tail()}"


@pytest.mark.parametrize("how", ["SIGTERM", "SIGKILL"])
def test_a_restart_loses_neither_the_running_nor_the_suspended(second, image, how):
    running, asleep = Microvm.run(second, image), Microvm.run(second, image)
    token = {running.id: running.token(), asleep.id: asleep.token()}
    before = {vm.id: vm.count() for vm in (running, asleep)}
    asleep.suspend()
    vmm = running.processes()
    assert vmm, "a running microVM has a process"

    end(second, how)
    assert running.processes() == vmm, "the VMM of a running microVM outlives the node"
    second.start()

    assert (running.state, asleep.state) == ("RUNNING", "SUSPENDED")
    assert running.processes() == vmm, "and is adopted, not started again"
    for vm in (running, asleep):
        answer = vm.curl("--header", f"X-aws-proxy-auth: {token[vm.id]}")
        assert answer.status == 200, f"a token from before the restart still works: {answer}"
        after = answer.json()
        assert after["pid"] == 1
        assert after["requests_served"] == before[vm.id]["requests_served"] + 1, f"{before[vm.id]} then {after}"
        assert after["uptime_seconds"] > before[vm.id]["uptime_seconds"]

    # What was adopted can do everything that it could do before.
    running.suspend()
    assert not running.processes()
    assert running.count()["requests_served"] == before[running.id]["requests_served"] + 2
    assert running.view()["endpoint"] == running.endpoint


def test_a_node_that_dies_in_the_middle_of_a_suspend_keeps_the_old_state_or_the_new_one(second, image):
    vm = Microvm.run(second, image)
    before = vm.count()
    second.client().suspend_microvm(microvmIdentifier=vm.id)
    second.kill()
    second.start()
    eventually("the microVM to be RUNNING or SUSPENDED", lambda: vm.state in ("RUNNING", "SUSPENDED"), within=60)
    after = vm.count()
    assert (after["pid"], after["requests_served"]) == (1, before["requests_served"] + 1), f"{before} then {after}"


def test_a_node_that_dies_in_the_middle_of_a_wake_can_wake_it_again(second, image):
    vm = Microvm.run(second, image)
    before = vm.count()
    vm.suspend()
    second.client().resume_microvm(microvmIdentifier=vm.id)
    second.kill()
    second.start()
    after = vm.count()
    assert (after["pid"], after["requests_served"]) == (1, before["requests_served"] + 1), f"{before} then {after}"
    assert len(vm.processes()) >= 1


def test_a_launch_that_a_crash_interrupts_ends_one_way_or_the_other(second, image):
    vm = Microvm.run(second, image, wait=False)
    second.kill()
    second.start()
    state = eventually("the launch to be settled", lambda: (seen := vm.state) in ("RUNNING", "TERMINATED") and seen, within=120)
    if state == "RUNNING":
        assert vm.count()["pid"] == 1
    else:
        assert vm.view().get("stateReason"), "a launch that was lost says so"
        assert not vm.processes(), "and leaves nothing running"


def test_what_expired_while_the_node_was_down_is_ended_when_it_is_back(second, image):
    vm = Microvm.run(second, image, idle=PATIENT | {"suspendedDurationSeconds": 4})
    vm.suspend()
    over = time.time() + 5
    second.stop()
    eventually("the sleep to have lasted too long", lambda: time.time() > over, within=10)
    second.start()
    vm.reaches("TERMINATED", within=10)


def test_the_same_client_token_is_the_same_microvm_after_a_restart_too(second, image):
    ask = {"imageIdentifier": image, "clientToken": "one-and-only", "idlePolicy": PATIENT}
    first = second.client().run_microvm(**ask)
    assert second.client().run_microvm(**ask)["microvmId"] == first["microvmId"]
    second.stop()
    second.start()
    assert second.client().run_microvm(**ask)["microvmId"] == first["microvmId"]


def test_images_survive(second, image):
    listed = second.client().list_microvm_images()["items"]
    assert [item["imageArn"] for item in listed] == [image]
    assert second.client("s3").head_object(Bucket=images.BUCKET, Key="hello-microvm-test.zip")["ContentLength"] > 0


def test_two_nodes_do_not_share_a_data_directory(second):
    """The second one must say so and go, not damage what the first one holds."""
    config = second.directory / "rival.toml"
    config.write_text('[edge]\nlisten = "127.0.0.1:0"\n[api]\nlisten = "127.0.0.1:0"\n[admin]\nlisten = "127.0.0.1:0"\n')
    rival = subprocess.run([binary(), "serve", "--config", config, "--data-dir", second.data_dir], capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert rival.returncode not in (0, 101), f"{rival.returncode}: {rival.stderr}"
    assert str(second.data_dir) in rival.stderr, f"it must name the directory: {rival.stderr}"
    assert second.admin_get("/readyz")[0] == 200
