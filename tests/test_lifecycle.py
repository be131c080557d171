"""When a microVM sleeps, wakes and ends: cases 38 to 40 of the project's list and the rules of its design."""
import asyncio
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from botocore.exceptions import ClientError

from harness import clients
from harness.microvm import PATIENT, Microvm
from harness.waiting import eventually

NO_AUTO_RESUME = PATIENT | {"autoResumeEnabled": False}


@pytest.fixture(scope="module")
def dozer(node, kitchen_image):
    """A microVM with a very short idle policy that nobody talks to while the other tests of this file run."""
    return Microvm.run(node, kitchen_image, idle={"maxIdleDurationSeconds": 3, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True})


# -- waking -----------------------------------------------------------------------------------------------------------


def test_fifty_requests_to_one_sleeper_make_one_wake_and_fifty_good_answers(node, run, kitchen_image):
    vm = run(kitchen_image)
    start = vm.count()["requests_served"]
    vm.suspend()
    wakes = node.wakes()
    headers = {"X-aws-proxy-auth": vm.token()}

    async def all_at_once():
        tls = clients.tls(node)
        limits = httpx.Limits(max_connections=50)
        common = {"verify": tls, "trust_env": False, "timeout": 120, "headers": headers, "limits": limits}
        # Twenty-five connections of their own, and twenty-five streams of one HTTP/2 connection.
        async with httpx.AsyncClient(**common) as h1, httpx.AsyncClient(http1=False, http2=True, **common) as h2:
            return await asyncio.gather(*(client.get(vm.url + "/") for client in [h1] * 25 + [h2] * 25))

    answers = asyncio.run(all_at_once())
    statuses = sorted({answer.status_code for answer in answers})
    assert statuses == [200], f"fifty good answers; got {[(a.status_code, a.text[:80], a.headers.get('x-dormouse-reason')) for a in answers if a.status_code != 200]}"
    served = sorted(answer.json()["requests_served"] for answer in answers)
    assert served == list(range(start + 1, start + 51)), f"every request is served once, none twice: {served}"
    assert node.wakes() == wakes + 1, f"one wake for all; there were {node.wakes() - wakes:g}"


def test_a_client_that_leaves_does_not_take_the_wake_with_it(node, run, kitchen_image):
    vm = run(kitchen_image)
    vm.suspend()
    wakes = node.wakes()
    token = vm.token()

    def impatient(_):
        with httpx.Client(verify=clients.tls(node), trust_env=False, timeout=httpx.Timeout(60, read=0.01)) as client:
            try:
                client.get(vm.url + "/", headers={"X-aws-proxy-auth": token})
            except httpx.ReadTimeout:
                return "left"
            return "stayed"

    with ThreadPoolExecutor(10) as pool:
        left = list(pool.map(impatient, range(10)))
        assert "left" in left, "no client was impatient enough for this test to show anything"
    assert vm.count()["pid"] == 1
    assert node.wakes() == wakes + 1, f"one wake, whoever stayed for it; there were {node.wakes() - wakes:g}"


def test_without_auto_resume_a_request_is_refused_and_the_microvm_sleeps_on(run, kitchen_image):
    vm = run(kitchen_image, idle=NO_AUTO_RESUME)
    token = vm.token()
    vm.suspend()
    for protocol in ("--http1.1", "--http2"):
        answer = vm.curl(protocol, "--header", f"X-aws-proxy-auth: {token}")
        assert (answer.status, answer.text) == (502, ""), f"AWS answers an empty 502: {answer}"
        assert answer.headers.get("x-dormouse-reason"), f"and ours says why: {answer}"
    assert vm.state == "SUSPENDED"
    assert vm.resume().count()["pid"] == 1, "ResumeMicrovm still wakes it"


def test_tokens_are_minted_while_asleep_and_minting_wakes_nobody(node, run, kitchen_image):
    vm = run(kitchen_image)
    vm.suspend()
    wakes = node.wakes()
    token = vm.token()
    assert vm.state == "SUSPENDED" and node.wakes() == wakes
    assert vm.curl("--header", f"X-aws-proxy-auth: {token}").status == 200


def test_sleep_after_sleep_after_sleep(run, kitchen_image):
    """A chain of generations: each one starts from the snapshot of the one before."""
    vm = run(kitchen_image)
    born = vm.count()["born"]
    with vm.http() as client:
        client.put("/note?name=story", content="once upon a time")
    for night in range(4):
        before = vm.count()["requests_served"]
        vm.suspend()
        after = vm.count()
        assert (after["requests_served"], after["born"]) == (before + 1, born), f"night {night}: {after}"
    with vm.http() as client:
        assert client.get("/note?name=story").json() == {"note": "once upon a time"}


# -- the clock and the dice -------------------------------------------------------------------------------------------


def test_a_waking_guest_has_the_right_time_and_its_timers_do_not_all_fire(run, kitchen_image, kitchen):
    vm = run(kitchen_image)
    with vm.http() as client:
        before = client.get("/time").json()
        vm.suspend()
        with kitchen.http() as awake:
            awake.get("/slow?seconds=4")
            host = awake.get("/time").json()
        after = client.get("/time").json()
    slept = after["realtime"] - before["realtime"]
    assert 0 <= after["realtime"] - host["realtime"] < 30, f"the sleeper's clock is {after['realtime'] - host['realtime']:.1f} s off its neighbour's"
    assert slept > 4
    assert after["monotonic"] - before["monotonic"] < slept - 3, f"CLOCK_MONOTONIC must not jump over the sleep: {before} then {after}"
    assert after["boottime"] >= before["boottime"], f"CLOCK_BOOTTIME goes back: {before} then {after}"


def test_clones_of_one_image_throw_different_dice(run, kitchen_image):
    def dice(vm):
        with vm.http() as client:
            return client.get("/random").json()["urandom"]

    one, two = run(kitchen_image), run(kitchen_image)
    assert one.count()["born"] == two.count()["born"], "both come from one snapshot, or this test shows nothing"
    seen = [dice(one), dice(two), dice(one), dice(two)]
    one.suspend()
    seen.append(dice(one))
    assert len(set(seen)) == len(seen), f"random bytes were seen twice: {seen}"


# -- suspending -------------------------------------------------------------------------------------------------------


def test_suspending_and_resuming_twice_is_harmless(node, run, kitchen_image):
    vm, client = run(kitchen_image), node.client()
    client.resume_microvm(microvmIdentifier=vm.id)
    vm.suspend()
    client.suspend_microvm(microvmIdentifier=vm.id)
    assert vm.state == "SUSPENDED"
    vm.resume()
    assert vm.count()["pid"] == 1


def test_requests_during_a_suspend_are_served_once_before_or_after(node, run, kitchen_image):
    """Case 39: traffic all the way through SUSPENDING. Nobody gets a 5xx and nobody is served twice."""
    vm = run(kitchen_image)
    start = vm.count()["requests_served"]
    stop, answers = threading.Event(), []

    def traffic():
        with vm.http() as client:
            while not stop.is_set():
                answers.append(client.get("/"))

    threads = [threading.Thread(target=traffic) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            seen = len(answers)
            node.client().suspend_microvm(microvmIdentifier=vm.id)
            eventually("answers after the suspend was asked for", lambda: len(answers) >= seen + 6, within=60)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    bad = [(answer.status_code, answer.headers.get("x-dormouse-reason")) for answer in answers if answer.status_code != 200]
    assert not bad, f"{len(bad)} of {len(answers)} requests failed: {bad[:5]}"
    served = sorted(answer.json()["requests_served"] for answer in answers)
    assert served == list(range(start + 1, start + 1 + len(answers))), "every request was served exactly once"


def test_an_answer_that_is_being_computed_survives_a_suspend(node, run, kitchen_image):
    vm = run(kitchen_image)
    with ThreadPoolExecutor(1) as pool, vm.http() as client:
        slow = pool.submit(client.get, "/slow?seconds=3")
        eventually("the request to be on its way", lambda: open_requests(vm), within=30)
        node.client().suspend_microvm(microvmIdentifier=vm.id)
        answer = slow.result(120)
    assert answer.status_code == 200 and answer.json()["pid"] == 1, f"{answer.status_code} {answer.text!r}"


def open_requests(vm):
    """True once a later request has been answered: the one before is then in the guest as well."""
    return vm.count()["pid"] == 1


def test_a_microvm_left_alone_goes_to_sleep_by_itself(node, dozer):
    dozer.reaches("SUSPENDED", within=60)
    assert dozer.count()["pid"] == 1, "and wakes like any other"


def test_a_request_that_takes_longer_than_the_idle_time_is_activity(node, run, kitchen_image):
    """AWS freezes the app in the middle of it; this is one of the deliberate differences (design §3)."""
    vm = run(kitchen_image, idle={"maxIdleDurationSeconds": 2, "suspendedDurationSeconds": 3600, "autoResumeEnabled": True})
    wakes = node.wakes()
    with vm.http() as client:
        before = client.get("/time").json()
        client.get("/slow?seconds=6")
        after = client.get("/time").json()
    assert after["monotonic"] - before["monotonic"] > 5.5, "the app was frozen while it computed an answer"
    assert node.wakes() <= wakes + 1


# -- ending -----------------------------------------------------------------------------------------------------------


def test_an_app_that_exits_ends_its_microvm_with_its_exit_code(run, kitchen_image):
    vm = run(kitchen_image)
    token = vm.token()
    with vm.http() as client:
        assert client.get("/exit?code=7").status_code == 200
    vm.reaches("TERMINATED", within=60)
    assert vm.view()["stateReason"] == "Container Stopped with Exit Code: 7"
    assert vm.curl("--header", f"X-aws-proxy-auth: {token}").status == 502


def test_a_sleep_that_is_long_enough_is_the_end(run, kitchen_image):
    vm = run(kitchen_image, idle={"maxIdleDurationSeconds": 3600, "suspendedDurationSeconds": 1, "autoResumeEnabled": True})
    vm.node.client().suspend_microvm(microvmIdentifier=vm.id)
    vm.reaches("TERMINATED", within=60)


def test_the_maximum_duration_is_the_end(run, kitchen_image):
    vm = run(kitchen_image, maximumDurationInSeconds=15, wait=False)
    vm.reaches("TERMINATED", within=90)
    assert not vm.processes(), f"still there: {vm.processes()}"


def test_terminating_twice_is_fine_and_nothing_else_is_possible_then(node, run, kitchen_image):
    vm, client = run(kitchen_image).terminate(), node.client()
    client.terminate_microvm(microvmIdentifier=vm.id)
    with pytest.raises(ClientError) as refused:
        client.suspend_microvm(microvmIdentifier=vm.id)
    error = refused.value.response["Error"]
    assert error["Code"] == "ValidationException", error
    assert error["Message"] == f"The MicroVM {vm.id} has been terminated and its state cannot be changed."
    assert not vm.processes()


# -- crashes ----------------------------------------------------------------------------------------------------------


def test_a_vmm_that_is_killed_is_noticed_and_said(run, kitchen_image):
    """Case 40: kill -9 of the VMM of a running microVM that has never slept: it is gone, with a reason, and 502."""
    vm = run(kitchen_image)
    token = vm.token()
    for pid, _ in vmm_of(vm):
        os.kill(pid, signal.SIGKILL)
    vm.reaches("TERMINATED", within=60)
    assert vm.view().get("stateReason"), "a microVM that ended unasked says why"
    answer = vm.curl("--header", f"X-aws-proxy-auth: {token}")
    assert answer.status == 502, str(answer)


def test_a_vmm_that_is_killed_does_not_leave_a_request_hanging(run, kitchen_image):
    vm = run(kitchen_image)
    with ThreadPoolExecutor(1) as pool, vm.http() as client:
        slow = pool.submit(client.get, "/slow?seconds=60")
        eventually("the request to be on its way", lambda: open_requests(vm), within=30)
        for pid, _ in vmm_of(vm):
            os.kill(pid, signal.SIGKILL)
        answer = slow.result(30)
    assert answer.status_code == 502, f"{answer.status_code} {answer.text!r}"


def vmm_of(vm):
    found = vm.processes()
    assert found, f"{vm.id} is {vm.state} and no process holds its files"
    return found
