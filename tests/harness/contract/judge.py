"""What a run has shown: everything that was sent, against what the guests say they executed and what the node says it did.

A surprise is anything that the contract does not promise: an unexpected end, a byte too few or too many, a request that was
executed twice, a place that is not freed, an error in the node's log. Slowness is none.
"""
import re
from collections import Counter, defaultdict
from datetime import datetime, timezone

from ..waiting import NeverHappened, eventually

# Kinds that a guest executes, by how the client's end of it decides how often.
ONCE = {"get", "post", "drop", "cut", "ws-short", "ws", "chat", "sse"}
# A line's level, as JSON or with a terminal's colours around it.
LOUD = re.compile(r"(?<![A-Z_])(?P<level>ERROR|WARN)(?![A-Z_])|panicked")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z")
# What must be nothing once every client has gone, and how long that may take. A connection to a guest is kept for its next
# request (edge.upstream_keepalive_secs).
GAUGES = {"idle_requests_waiting": 30, "edge_open_streams": 30, "edge_connections": 30, "edge_upstream_streams": 90}
# Lines of the log shown for one surprise.
SHOWN = 12


def percentile(values, share):
    """The value below which `share` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Verdict:
    """Made before the run, so that it knows what was there before it."""

    def __init__(self, node, fleet, plan):
        self.node, self.fleet, self.plan = node, fleet, plan
        self.before = node.metrics()
        self.log_from = node.log.stat().st_size
        self.outcomes, self.surprises = [], []
        self.left = self.left_asleep = 0

    def surprise(self, what, outcome=None, node_ids=()):
        self.surprises.append({"what": what, "outcome": outcome, "node_ids": [name for name in node_ids if name]})

    def judge(self, player):
        """Compares."""
        self.started_at = player.started_at
        self.outcomes = player.outcomes
        for outcome in self.outcomes:
            entry = player.ledgers[outcome.vm].get(outcome.name, {})
            outcome.executions = entry.get("begun", 0) if outcome.kind in ONCE | {"grpc", "leave"} else None
            for problem in self._problems(player, outcome, entry):
                self.surprise(problem, outcome, {outcome.node_id, *entry.get("node_ids", ())})
        known = {"settings"} | {outcome.name for outcome in self.outcomes} | {f"end-of-sse-{vm}-{http}" for vm in range(len(self.fleet)) for http in ("h1", "h2")}
        for at, ledger in enumerate(player.ledgers):
            for name in ledger.keys() - known:
                self.surprise(f"{self.fleet[at].id} executed {name}, which nobody sent: {ledger[name]}", node_ids=ledger[name]["node_ids"])
        missing = Counter(shot.kind for shot in self.plan.shots) - Counter(outcome.kind for outcome in self.outcomes)
        for kind, count in missing.items():
            self.surprise(f"{count} {kind} have no outcome (their stream had ended)")
        for vm in self.fleet:
            view = vm.view()
            if view["state"] not in ("RUNNING", "SUSPENDING", "SUSPENDED") or view.get("stateReason"):
                self.surprise(f"{vm.id} is {view['state']}: {view.get('stateReason')}")

    def _problems(self, player, outcome, entry):
        if outcome.problem:
            yield outcome.problem
        begun, done = entry.get("begun", 0), entry.get("done", 0)
        if begun > 1:
            yield f"the guest got it {begun} times"
        if outcome.kind in ONCE and not (begun and done):
            yield f"the guest got it {begun} times and finished it {done} times: {entry}"
        if outcome.kind in ("grpc", "leave") and outcome.status in ("OK", "200") and not done:
            yield "the guest never executed it, and it was answered"
        if outcome.kind == "leave" and outcome.protocol.startswith("upload") and done:
            yield f"a body that its client cut was taken for whole: {entry}"
        for key, value in player.sent.get(outcome.name, {}).items():
            if entry.get(key) != value and not (outcome.kind == "post" and not done):
                yield f"{key} is {value} at the client and {entry.get(key)} in the guest"

    def settle(self):
        """When everything is over: places are free, and the node has nothing bad to say."""
        for gauge, within in GAUGES.items():
            try:
                eventually(f"{gauge} to be 0", lambda: self.node.metrics().total(gauge) == 0, within=within, every=0.5)
            except NeverHappened:
                self.surprise(f"{gauge} is {self.node.metrics().total(gauge):g} {within} s after the last client has gone")
        after = self.node.metrics()
        self.deltas = {
            name: {label: int(count) for label, count in self._delta(after, name, key).items() if count}
            for name, key in (("idle_wakes_total", "outcome"), ("idle_suspends_total", "outcome"), ("edge_refusals_total", "reason"),
                              ("edge_requests_total", "status_class"))
        }
        drops = sum(outcome.kind == "drop" for outcome in self.outcomes)
        cuts = sum(outcome.kind == "cut" for outcome in self.outcomes)
        for reason, count in self.deltas["edge_refusals_total"].items():
            if reason != "guest-answer-broken" or count > drops + cuts:
                self.surprise(f"the node refused {count} requests as {reason}")
        for outcome in ("failed", "damaged", "terminated"):
            if count := self.deltas["idle_wakes_total"].get(outcome):
                self.surprise(f"{count} wakes ended as {outcome}")
        for outcome in ("failed", "ended"):
            if count := self.deltas["idle_suspends_total"].get(outcome):
                self.surprise(f"{count} suspends ended as {outcome}")
        self.loud = [line for line in self.log() if LOUD.search(line)]
        for line in self.loud:
            if LOUD.search(line)["level"] != "WARN":
                self.surprise(f"the node's log: {line}")

    def _delta(self, after, name, key):
        counts = defaultdict(float)
        for metrics, sign in ((after, 1), (self.before, -1)):
            for sample in metrics.samples:
                if sample.name == name:
                    counts[sample.labels[key]] += sign * sample.value
        return counts

    # -- the log --------------------------------------------------------------------------------------------------

    def log(self):
        """The lines of this run."""
        with self.node.log.open(errors="replace") as log:
            log.seek(self.log_from)
            return log.read().splitlines()

    def lines_for(self, surprise, log):
        """What the node said about it: lines with one of its request ids, or loud ones and transitions of its microVM around
        its time."""
        found = [line for line in log if any(name in line for name in surprise["node_ids"])]
        outcome = surprise["outcome"]
        if outcome is not None:
            vm = self.fleet[outcome.vm].id
            begin = self.started_at + outcome.at - 1
            end = self.started_at + outcome.at + max(outcome.seconds, 0) + 1
            for line in log:
                stamp = TIME.search(line)
                if stamp and (LOUD.search(line) or (vm in line and "transition" in line)):
                    when = datetime.fromisoformat(stamp[0]).astimezone(timezone.utc).timestamp()
                    if begin <= when <= end:
                        found.append(line)
        return found[:SHOWN]

    def describe(self):
        """Every surprise with its ids and the node's lines for it."""
        log = self.log() if self.surprises else []
        texts = []
        for surprise in self.surprises:
            outcome = surprise["outcome"]
            what = f"{outcome.name} ({outcome.protocol}, {self.plan.modes[outcome.vm]}) at {outcome.at:.3f} s for {outcome.seconds:.3f} s: " if outcome else ""
            text = f"{what}{surprise['what']}\n    request ids: {', '.join(surprise['node_ids']) or 'none'}"
            texts.append(text + "".join(f"\n    | {line}" for line in self.lines_for(surprise, log)))
        return texts

    # -- figures --------------------------------------------------------------------------------------------------

    def statuses(self):
        """(kind, protocol, awake or flapping) -> status -> count."""
        table = defaultdict(Counter)
        for outcome in self.outcomes:
            table[self._row(outcome)][outcome.status] += 1
        return dict(sorted(table.items()))

    def latencies(self):
        """The same rows -> seconds of what went as planned."""
        table = defaultdict(list)
        for outcome in self.outcomes:
            if outcome.problem is None and outcome.kind in ("get", "post", "grpc", "ws-short", "ws-message", "chat-message", "sse-event", "drop"):
                if outcome.status != "DEADLINE_EXCEEDED":
                    table[self._row(outcome)].append(outcome.seconds)
        return dict(sorted(table.items()))

    def _row(self, outcome):
        return outcome.kind, outcome.protocol, "awake" if self.plan.modes[outcome.vm] == "awake" else "flapping"

    def lateness(self):
        """How late the driver itself began its shots."""
        return [outcome.late for outcome in self.outcomes if outcome.late]
