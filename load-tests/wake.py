#!/usr/bin/env python3
"""What a sleep costs the caller: python load-tests/wake.py [--rounds N] [--json FILE]

Starts a node of its own, builds the demo's image, runs one microVM, and then, round by round: a warm request, a suspend,
a request to the sleeping microVM. Every request has a connection and a TLS handshake of its own, so that the difference
between a waking and a warm request is the wake. Prints percentiles and the ratio to the warm request, and the node's own
phases of a wake.

Owns: the node it starts. Bounded: one request at a time, N rounds.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("DORMOUSE_BIN", str(Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "dormouse"))

from harness.clients import loopback_for_localhost  # noqa: E402
from harness.images import MEMORY_MIB, build, zip_of  # noqa: E402
from harness.microvm import Microvm  # noqa: E402
from harness.node import Node  # noqa: E402

DEMO_APP = ROOT / "demo" / "app"


def percentile(values, share):
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def timed(action):
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def phases(node):
    """Mean seconds of each phase of all wakes so far, as the node measured them."""
    found = {}
    for sample in node.metrics().samples:
        kind = {"idle_wake_seconds_sum": 0, "idle_wake_seconds_count": 1}.get(sample.name)
        if kind is not None:
            found.setdefault(sample.labels["phase"], [0.0, 0.0])[kind] = sample.value
    return {phase: total / count for phase, (total, count) in found.items() if count}


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=50)
    arguments.add_argument("--json", type=Path, help="also write every sample here")
    asked = arguments.parse_args()

    loopback_for_localhost()
    samples = {"launch": [], "warm": [], "suspend": [], "wake": []}
    with tempfile.TemporaryDirectory(prefix="dormouse-load-") as directory, Node(directory) as node:
        print(f"building the image ({MEMORY_MIB} MiB) …", flush=True)
        image = build(node, "wake", zip_of(DEMO_APP))
        began = time.perf_counter()
        vm = Microvm.run(node, image)
        vm.count()
        samples["launch"].append(time.perf_counter() - began)
        for done in range(asked.rounds):
            samples["warm"].append(timed(vm.count))
            samples["suspend"].append(timed(vm.suspend))
            samples["wake"].append(timed(vm.count))
            print(f"\r{done + 1}/{asked.rounds} rounds", end="", flush=True)
        print()
        seen = phases(node)

    warm = percentile(samples["warm"], 0.5)
    print(f"\n{'':<10}{'n':>5}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'max ms':>10}{'p50 / warm p50':>17}")
    for name, values in samples.items():
        row = [percentile(values, share) * 1000 for share in (0.5, 0.9, 0.99)] + [max(values) * 1000]
        print(f"{name:<10}{len(values):>5}" + "".join(f"{value:>10.1f}" for value in row) + f"{row[0] / 1000 / warm:>17.1f}")
    print("\nphases of a wake, mean ms: " + ", ".join(f"{phase} {mean * 1000:.1f}" for phase, mean in seen.items()))
    if asked.json:
        asked.json.write_text(json.dumps({"samples": samples, "phases": seen}, indent=1))


if __name__ == "__main__":
    main()
