"""What an operator sees: health, and every number that is promised, moving when the thing it counts happens.

Gauges and counters are read over the admin port as a Prometheus server reads them, and judged by promtool.
"""
import re
import subprocess

import httpx
import pytest

from harness import clients
from harness.waiting import eventually

# Everything that names one microVM, image, host or client: as a label it would make a new series for each.
IDENTIFIER = re.compile(r"microvm-[0-9a-f]{8}|[0-9a-f]{8}-[0-9a-f]{4}-|arn:aws|127\.0\.0\.1|\.localhost|kitchen|hello-")


def moved(node, before, name, **labels):
    return node.metrics().total(name, **labels) - before.total(name, **labels)


def eventually_moved(node, before, by, name, **labels):
    """Counters are written when a request is over, which the client may learn a moment earlier."""
    eventually(f"{name}{labels} to grow by {by}", lambda: moved(node, before, name, **labels) == by, within=10)


def test_health_and_readiness(node):
    assert node.admin_get("/healthz")[0] == 200
    assert node.admin_get("/readyz")[0] == 200
    assert node.admin_get("/nothing-here")[0] == 404


def test_promtool_has_nothing_to_say(node, kitchen):
    kitchen.count()
    checked = subprocess.run(["promtool", "check", "metrics"], input=node.metrics().text, capture_output=True, text=True, timeout=30)
    said = (checked.stdout + checked.stderr).strip()
    assert checked.returncode == 0 and not said, f"promtool: {said}"


@pytest.mark.parametrize("http2, protocol", [(False, "h1"), (True, "h2")])
def test_requests_are_counted_by_protocol_and_status_class(node, kitchen, http2, protocol):
    before = node.metrics()
    with kitchen.http(http2=http2) as client:
        for code in (200, 200, 301, 404, 503):
            client.get(f"/status?code={code}")
    for status_class, by in (("2xx", 2), ("3xx", 1), ("4xx", 1), ("5xx", 1)):
        eventually_moved(node, before, by, "edge_requests_total", protocol=protocol, status_class=status_class)


def test_refusals_are_counted_by_reason(node, kitchen, other):
    before = node.metrics()

    def ask(*lines):
        return clients.raw_get(node, kitchen.host, lines).headers["x-dormouse-reason"]

    reasons = [
        ask(),
        ask("X-aws-proxy-auth: nonsense"),
        ask(f"X-aws-proxy-auth: {other.token()}"),
        ask(f"X-aws-proxy-auth: {kitchen.token(8080)}", "X-aws-proxy-port: 9000"),
        ask(f"X-aws-proxy-auth: {kitchen.token(8080)}", "X-aws-proxy-port: none"),
    ]
    assert len(set(reasons)) == len(reasons), f"five mistakes, five words: {reasons}"
    for reason in reasons:
        eventually_moved(node, before, 1, "edge_refusals_total", reason=reason)


def test_bytes_are_counted_both_ways(node, kitchen):
    before = node.metrics()
    with kitchen.http(http2=True) as client:
        client.post("/upload", content=b"x" * 300_000)
        client.get("/big?bytes=500000")
    eventually("the bytes to be counted", lambda: moved(node, before, "edge_bytes_total", direction="in") >= 300_000, within=10)
    eventually("the bytes to be counted", lambda: moved(node, before, "edge_bytes_total", direction="out") >= 500_000, within=10)


def test_open_streams_are_a_gauge_that_comes_down_again(node, kitchen):
    before = node.open_streams()
    with kitchen.http(http2=True) as client, client.stream("GET", "/sse?every=0.1") as stream:
        lines = stream.iter_lines()  # Kept: the stream is closed with its last reader.
        next(lines)
        assert node.open_streams() == before + 1
    eventually("the stream to be gone", lambda: node.open_streams() == before, within=30)


def test_sleeping_and_waking_can_be_followed(node, run, kitchen_image):
    """States, suspends, wakes by outcome, and where the time of a wake went: its phases add up to the whole."""
    vm = run(kitchen_image)
    before = node.metrics()
    vm.suspend()
    assert moved(node, before, "idle_microvms", state="SUSPENDED") == 1
    assert moved(node, before, "idle_microvms", state="RUNNING") == -1
    assert moved(node, before, "idle_suspends_total", outcome="suspended") == 1
    assert moved(node, before, "idle_suspend_seconds_count") == 1
    assert moved(node, before, "idle_suspend_written_bytes_total", part="memory") > 0

    vm.count()
    assert moved(node, before, "idle_wakes_total", outcome="started") == 1
    assert moved(node, before, "idle_wakes_total") == 1
    assert moved(node, before, "idle_microvms", state="SUSPENDED") == 0
    after = node.metrics()
    spent = {
        sample.labels["phase"]: sample.value - before.total("idle_wake_seconds_sum", phase=sample.labels["phase"])
        for sample in after.samples if sample.name == "idle_wake_seconds_sum"
    }
    total = spent.pop("total")
    assert total > 0 and len(spent) >= 2, f"one wake, and where its time went: {spent}"
    assert sum(spent.values()) == pytest.approx(total, rel=0.1, abs=0.02), f"the phases add up to the total of {total:.3f} s: {spent}"


def test_no_series_for_a_single_microvm_image_or_client(node, kitchen):
    """A scanner with random hosts, paths and ports must not fill the memory of the Prometheus server."""
    count = lambda: len(node.metrics().samples)
    kitchen.count()
    before = count()
    for number in range(30):
        clients.raw_get(node, f"{number:08x}-0000-4000-8000-000000000000.{kitchen.host.split('.', 1)[1]}", [f"X-aws-proxy-port: {number}"], path=f"/{number}")
    assert count() == before, "random requests made new series"
    named = [f"{sample.name}{sample.labels}" for sample in node.metrics().samples if any(IDENTIFIER.search(value) for value in sample.labels.values())]
    assert not named, f"labels that name one thing: {named[:5]}"


def test_the_edge_shows_nothing_of_the_operators(node, kitchen):
    for path in ("/metrics", "/healthz", "/readyz"):
        assert clients.raw_get(node, kitchen.host, [], path=path).status == 403
        with httpx.Client(verify=clients.tls(node), trust_env=False) as client:
            assert client.get(f"https://{node.edge}{path}").status_code in (400, 403, 404, 421)
