#!/usr/bin/env python3
"""The wake contract under load: python load-tests/contract.py [--seconds N] [--microvms N] [--load FACTOR] [--seed N]

Starts a node of its own, builds the image of tests/apps/contract, and lets a fleet of microVMs flap between asleep and
awake, by SuspendMicrovm and by an idle time of one second, under an open-loop mix of GET, 10 MiB POST, gRPC with a deadline
of 5 s, WebSocket and server-sent events. The first microVM never sleeps: its figures are the baseline of the same run.
Everything is decided beforehand from the seed. See tests/harness/contract.

Prints and writes (results/<name>.md, .jsonl) counts per status and latencies from the planned time. Ends with 1 if anything
was a surprise, with the request ids and the node's log lines for it.

Owns: the node it starts. Bounded: at most 50 minutes (tokens live an hour), and by the plan.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("DORMOUSE_BIN", str(Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "dormouse"))

from harness import contract  # noqa: E402
from harness.clients import loopback_for_localhost  # noqa: E402
from harness.contract.judge import percentile  # noqa: E402
from harness.contract.plan import Plan  # noqa: E402
from harness.contract.play import Outcome  # noqa: E402
from harness.images import grpc_wheels  # noqa: E402
from harness.node import Node  # noqa: E402

RESULTS = Path(__file__).parent / "results"


def table(verdict):
    """The report's two tables, in Markdown."""
    yield "| what | protocol | microVM | counts per status |"
    yield "|---|---|---|---|"
    for (kind, protocol, where), counts in verdict.statuses().items():
        yield f"| {kind} | {protocol} | {where} | {', '.join(f'{status} {count}' for status, count in counts.most_common())} |"
    yield ""
    yield "| what | protocol | microVM | n | p50 ms | p90 ms | p99 ms | max ms | p50 / awake |"
    yield "|---|---|---|---:|---:|---:|---:|---:|---:|"
    latencies = verdict.latencies()
    for (kind, protocol, where), values in latencies.items():
        row = [percentile(values, share) * 1000 for share in (0.5, 0.9, 0.99)] + [max(values) * 1000]
        awake = latencies.get((kind, protocol, "awake"))
        ratio = f"{percentile(values, 0.5) / percentile(awake, 0.5):.1f}" if awake else "–"
        yield f"| {kind} | {protocol} | {where} | {len(values)} | " + " | ".join(f"{value:.0f}" for value in row) + f" | {ratio} |"


def report(verdict, began, load):
    plan = verdict.plan
    yield "# The wake contract"
    yield ""
    yield (f"Seed {plan.seed}, {plan.seconds} s, {len(plan.modes)} microVMs ({', '.join(plan.modes)}), load {plan.load:g}, "
           f"flap {plan.flap:g}, app's keep-alive {plan.app_keepalive:g} s; {began}. "
           f"Load average {load[0]:.1f} at the start and {os.getloadavg()[0]:.1f} at the end, {os.cpu_count()} CPUs.")
    yield ""
    yield "Latencies count from the planned time and include what the driver itself was late, p50 / p99 / max ms: " + " / ".join(
        f"{percentile(verdict.lateness(), share) * 1000:.0f}" for share in (0.5, 0.99, 1)) + ". DEADLINE_EXCEEDED is expected on a busy machine and counted."
    yield ""
    for name, counts in verdict.deltas.items():
        yield f"- `{name}`: " + (", ".join(f"{label} {count}" for label, count in sorted(counts.items())) or "none")
    yield f"- clients that left while they were held, and freed their places before the hold ended: {verdict.left}"
    yield f"- clients of open streams that left a sleeping microVM, and freed their places without waking it: {verdict.left_asleep}"
    yield f"- warnings in the node's log: {len(verdict.loud)}"
    yield f"- **surprises: {len(verdict.surprises)}**"
    yield ""
    yield from table(verdict)
    for text in verdict.describe():
        yield f"\n    {text}"


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seconds", type=int, default=300)
    arguments.add_argument("--microvms", type=int, default=4)
    arguments.add_argument("--load", type=float, default=1.0, help="factor on all rates of traffic")
    arguments.add_argument("--flap", type=float, default=1.0, help="factor on the calls of SuspendMicrovm and ResumeMicrovm")
    arguments.add_argument("--app-keepalive", type=float, default=0, metavar="SECONDS", help="the app closes connections that are idle for so long")
    arguments.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    arguments.add_argument("--name", default="contract", help="of the files in results/")
    arguments.add_argument("--keep", type=Path, help="copy the node's log here")
    asked = arguments.parse_args()
    if asked.seconds > 3000:
        arguments.error("--seconds: at most 3000")

    plan = Plan(asked.seed, asked.seconds, asked.microvms, asked.load, asked.flap, asked.app_keepalive)
    print(f"seed {asked.seed}: {dict(plan.counts())}", flush=True)
    loopback_for_localhost()
    began, load = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="dormouse-load-") as directory:
        node = Node(Path(directory) / "node", log='filter = "info,gateway=debug,idle_controller=debug,vmm_runtime=debug"\njson = true\n')
        try:
            with node:
                print(f"building the image (the node's log: {node.log}) …", flush=True)
                image = contract.build_image(node, grpc_wheels(Path(directory)))
                verdict = contract.run(node, image, plan)
                lines = list(report(verdict, began, load))
        finally:
            if asked.keep:
                shutil.copy(node.log, asked.keep)
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / f"{asked.name}.md").write_text(text)
    rows = [Outcome.columns()] + [outcome.row() for outcome in sorted(verdict.outcomes, key=lambda outcome: outcome.at)]
    (RESULTS / f"{asked.name}.jsonl").write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows))
    return 1 if verdict.surprises else 0


if __name__ == "__main__":
    sys.exit(main())
