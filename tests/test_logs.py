"""What an app says is kept and readable: live, across a sleep, after the end, within a bound, under the name that was asked for."""
import re
import threading
import urllib.error

import pytest

from harness.waiting import eventually

ROLE = "arn:aws:iam::123456789012:role/MicroVMExecutionRole"
KEPT = 8 << 20


def say(vm, text):
    with vm.http() as client:
        assert client.get("/say", params={"text": text}).status_code == 200


def logs(node, vm, **parameters):
    with node.signed(f"/dormouse/v1/microvms/{vm.id}/logs", **parameters) as answer:
        return answer.read().decode()


def log_dir(node, vm):
    return node.data_dir / "microvms" / vm.id / "log"


def test_output_is_read_live_across_a_sleep_and_after_the_end(node, run, kitchen_image):
    vm = run(kitchen_image)
    read, ended = [], threading.Event()

    def follow():
        with node.signed(f"/dormouse/v1/microvms/{vm.id}/logs", follow=1) as answer:
            for line in answer:
                read.append(line.decode().rstrip())
        ended.set()

    threading.Thread(target=follow, daemon=True).start()
    say(vm, "before the sleep")
    eventually("the first line to be followed", lambda: "before the sleep" in read, within=30)
    vm.suspend()
    say(vm, "after the sleep")
    eventually("the second line to be followed", lambda: "after the sleep" in read, within=30)
    vm.terminate()
    assert ended.wait(30), "a follower ends with its microVM"

    kept = [line for line in logs(node, vm).splitlines() if line.endswith(" the sleep")]
    assert kept == ["before the sleep", "after the sleep"], "the output stays after the end"
    assert [line for line in read if line.endswith(" the sleep")] == kept
    assert logs(node, vm, tail=1).count("\n") == 1
    # Nothing but logs is left of it.
    assert [entry.name for entry in (node.data_dir / "microvms" / vm.id).iterdir()] == ["log"]
    started = vm.view()["startedAt"]
    stream = f"{started:%Y}%2F{started:%m}%2F{started:%d}[1.0]{vm.id}"
    named = node.data_dir / "logs" / "%2Faws%2Flambda-microvms%2Fkitchen-sink" / stream / vm.id / "app.log"
    assert named.read_text() == logs(node, vm), "the same content under the name that CloudWatch would give it"


def test_a_flood_of_output_fills_no_disk_and_stalls_nobody(node, run, kitchen_image):
    vm = run(kitchen_image)
    with vm.http() as client:
        flood = threading.Thread(target=lambda: client.get("/say", params={"bytes": 4 * KEPT}), daemon=True)
        flood.start()
        asked = 0
        while flood.is_alive():
            vm.count()  # Asserts that it is answered.
            asked += 1
    assert asked, "it answers while it floods"
    say(vm, "the last words")
    eventually("the newest line to be kept", lambda: logs(node, vm, tail=1) and "the last words" in logs(node, vm, tail=3), within=60)
    sizes = {entry.name: entry.stat().st_size for entry in log_dir(node, vm).iterdir()}
    assert sizes.keys() == {"app.log", "app.log.1"} and sum(sizes.values()) <= KEPT, sizes
    assert sizes["app.log.1"] == KEPT // 2, sizes


def test_a_log_has_the_name_that_was_asked_for_or_is_not_kept(node, run, kitchen_image):
    group, stream = "/team/../../../etc", "../../outside"
    named = run(kitchen_image, executionRoleArn=ROLE, logging={"cloudWatch": {"logGroup": group, "logStream": stream}})
    silent = run(kitchen_image, logging={"disabled": {}})
    for vm in (named, silent):
        say(vm, f"I am {vm.id}")
    eventually("the named log", lambda: f"I am {named.id}" in logs(node, named), within=30)
    under = node.data_dir / "logs" / "%2Fteam%2F..%2F..%2F..%2Fetc" / "%2E.%2F..%2Foutside" / named.id / "app.log"
    assert under.read_text() == logs(node, named)

    silent.suspend()
    say(silent, "I am awake")
    assert not log_dir(node, silent).exists(), "nothing is kept where logging is disabled, in no life of the microVM"
    with pytest.raises(urllib.error.HTTPError) as refused:
        logs(node, silent)
    assert refused.value.code == 404 and "logging disabled" in refused.value.read().decode()


def test_what_a_build_said_is_read_by_its_image(node, kitchen_image):
    with node.signed("/dormouse/v1/images/kitchen-sink/logs", version="1.0") as answer:
        text = answer.read().decode()
    assert text == (node.data_dir / "images/kitchen-sink/1.0/build.log").read_text()
    named = list((node.data_dir / "logs" / "%2Faws%2Flambda-microvms%2Fkitchen-sink").glob("*/kitchen-sink-1.0.log"))
    assert len(named) == 1 and re.fullmatch(r"\d{4}%2F\d\d%2F\d\d\[0\.0\]kitchen-sink-1\.0", named[0].parent.name) and named[0].read_text() == text, named
    assert re.search(r"^STEP ", text, re.M) and text.rstrip().endswith("The image is ready."), text[-500:]


def test_logs_are_for_those_who_sign(node, kitchen):
    for signed_for in (None, "s3", "lambda-microvms"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            node.signed(f"/dormouse/v1/microvms/{kitchen.id}/logs", service=signed_for)
        assert refused.value.code in (400, 403, 404), f"signed for {signed_for}"
        assert b"GET /" not in refused.value.read()
    status, _ = node.admin_get(f"/dormouse/v1/microvms/{kitchen.id}/logs")
    assert status == 404, "the admin listener asks for no signature and so shows no log"
