"""What microVMs use is measured, kept across restarts and ends, and priced."""
import json

from harness import images
from harness.images import MEMORY_MIB
from harness.microvm import Microvm
from harness.node import Node
from harness.waiting import eventually


def usage(node, vm):
    with node.signed(f"/dormouse/v1/microvms/{vm.id}/usage") as answer:
        return json.load(answer)


def test_running_bursting_sleeping_and_sending_are_measured(node, run, kitchen_image):
    before = node.metrics()
    vm = run(kitchen_image)
    with vm.http() as client:
        assert len(client.get("/big", params={"bytes": 3_000_000}).content) == 3_000_000
        client.post("/upload", content=b"x" * 1_000_000)
    first = usage(node, vm)
    used = first["usage"]
    assert used["runningSeconds"] > 0
    # 512 MiB come with a quarter of a vCPU.
    assert abs(used["baselineGbSeconds"] - used["runningSeconds"] * MEMORY_MIB / 1024) < 1e-6, used
    assert abs(used["baselineVcpuSeconds"] - used["runningSeconds"] * MEMORY_MIB / 2048) < 1e-6, used
    assert 3_000_000 <= used["endpointSentBytes"] < 3_100_000, used
    assert 1_000_000 <= used["endpointReceivedBytes"] < 1_100_000, used
    assert used["snapshotReadBytes"] > 10 << 20, "a launch reads the image's snapshot"
    assert used["snapshotWrittenBytes"] == used["storageGbHours"] == 0, used
    assert first["cost"]["total"] > 0

    vm.suspend()
    asleep = usage(node, vm)["usage"]
    assert asleep["burstVcpuSeconds"] > 0, f"emulation takes more than a quarter of a CPU: {asleep}"
    assert asleep["snapshotWrittenBytes"] > 1 << 20, asleep
    grown = eventually("storage to be counted", lambda: (now := usage(node, vm)["usage"])["storageGbHours"] > asleep["storageGbHours"] and now, within=30)
    assert grown["runningSeconds"] == asleep["runningSeconds"], "asleep is not running"

    vm.count()  # Wakes it.
    awake = usage(node, vm)["usage"]
    assert awake["snapshotReadBytes"] - asleep["snapshotReadBytes"] == asleep["snapshotWrittenBytes"], "a resume reads what the suspend wrote"
    vm.terminate()
    ended = usage(node, vm)
    assert ended["state"] == "TERMINATED" and ended["usage"] == usage(node, vm)["usage"], "what has ended uses nothing"

    after = node.metrics()
    for name, used in (
        ("idle_usage_running_seconds_total", ended["usage"]["runningSeconds"]),
        ("idle_usage_storage_byte_seconds_total", ended["usage"]["storageGbHours"] * 3600 * 2**30),
    ):
        assert after.total(name) - before.total(name) >= used * 0.999, name
    assert after.total("idle_usage_endpoint_bytes_total", direction="sent") - before.total("idle_usage_endpoint_bytes_total", direction="sent") >= 3_000_000


def test_usage_outlives_a_crash_and_its_microvms(run_dir):
    """A node of its own, with prices of its own, that forgets what has ended at once."""
    with Node(run_dir / "usage", more="[prices]\nvcpu_second = 2\ngb_second = 0\nsnapshot_read_gb = 0\n") as node:
        settings = node.config.read_text().replace("least_idle_secs = 1\n", "least_idle_secs = 1\nkeep_terminated_secs = 2\n")
        image = images.build(node, "metered", images.zip_of(images.ARTICLE_APP))
        vm = Microvm.run(node, image)
        vm.count()
        vm.suspend()
        before = usage(node, vm)
        assert abs(before["cost"]["compute"] - 2 * (before["usage"]["baselineVcpuSeconds"] + before["usage"]["burstVcpuSeconds"])) < 1e-6, before

        node.kill()
        node.config.write_text(settings)
        node.start()
        after = usage(node, vm)["usage"]
        assert abs(after["runningSeconds"] - before["usage"]["runningSeconds"]) < 1e-6 and after["storageGbHours"] >= before["usage"]["storageGbHours"], (before, after)

        vm.terminate()
        last = usage(node, vm)["usage"]

        def forgotten():
            with node.signed("/dormouse/v1/usage") as answer:
                told = json.load(answer)
            return not told["microvms"] and told

        told = eventually("the microVM to be forgotten", forgotten, within=30)
        for again in (False, True):
            if again:
                node.stop()
                node.start()
                told = forgotten()
            assert [one["image"] for one in told["images"]] == ["metered"]
            assert told["images"][0]["usage"] == told["total"]["usage"]
            assert abs(told["total"]["usage"]["runningSeconds"] - last["runningSeconds"]) < 1e-6, "what a forgotten one used is its image's"
