"""What is sent when. Everything is drawn from the seed beforehand: how the node fares changes nothing of what it is sent
next (open loop), and the same seed sends the same again."""
import random
from collections import Counter
from dataclasses import dataclass, field

# How a microVM of the fleet is treated: AWAKE never sleeps and is the baseline; the others are asked to suspend, or have an
# idle policy of one second, or both.
AWAKE, ASKED, IDLES, BOTH = "awake", "asked", "idle", "both"
IDLE = (IDLES, BOTH)

BODY_BYTES = 10 << 20
DEADLINE = 5
# Times per second of each microVM while it is busy, which is about half of the time.
RATES = {
    "get": 4.0, "grpc": 1.5, "ws-message": 1.5, "chat-message": 0.7, "post": 0.12, "ws-short": 0.15, "leave": 0.5, "drop": 0.15, "cut": 0.05,
}
# Times per second in all of the time.
SUSPENDS = {AWAKE: 0.0, ASKED: 0.25, IDLES: 0.0, BOTH: 0.12}
RESUMES = {AWAKE: 0.0, ASKED: 0.05, IDLES: 0.03, BOTH: 0.05}


@dataclass(frozen=True)
class Shot:
    """One thing that happens: `at` seconds after the start, on microVM number `vm`."""

    at: float
    vm: int
    kind: str
    name: str
    detail: dict = field(default_factory=dict)


class Plan:
    """All shots in order, and the streams that are open from the start to the end."""

    def __init__(self, seed, seconds, microvms=4, load=1.0, flap=1.0, app_keepalive=0):
        assert microvms >= 2, "one microVM is the baseline, so there must be two at least"
        self.seed, self.seconds, self.load, self.flap = seed, seconds, load, flap
        # After this many seconds the app closes a connection that waits for its next request; 0: never.
        self.app_keepalive = app_keepalive
        flapping = [ASKED, IDLES, BOTH]
        self.modes = [AWAKE] + [flapping[at % 3] for at in range(microvms - 1)]
        self.dice = random.Random(seed)
        self.shots = sorted((shot for vm in range(microvms) for shot in self._of(vm)), key=lambda shot: shot.at)

    def counts(self):
        return Counter(shot.kind for shot in self.shots)

    def _of(self, vm):
        mode, dice = self.modes[vm], self.dice
        shots = []

        def add(kind, at, **detail):
            shots.append(Shot(at, vm, kind, f"{kind}-{vm}-{len(shots)}", detail))

        for begin, end in self._busy():
            for kind, rate in RATES.items():
                for at in self._arrivals(rate * self.load, begin, end):
                    add(kind, at, **self._detail(kind))
        for kind, rate in (("suspend", SUSPENDS[mode]), ("resume", RESUMES[mode])):
            for at in self._arrivals(rate * self.flap, 0, self.seconds):
                add(kind, at)
        return shots

    def _busy(self):
        """Periods of traffic. Every second gap is about as long as the idle time, so that traffic and sleep meet."""
        at = self.dice.uniform(0, 1)
        while at < self.seconds:
            end = min(at + 0.5 + self.dice.expovariate(1 / 3), self.seconds)
            yield at, end
            at = end + (self.dice.uniform(0.9, 1.4) if self.dice.random() < 0.5 else self.dice.uniform(2, 5))

    def _arrivals(self, rate, begin, end):
        at = begin
        while rate and (at := at + self.dice.expovariate(rate)) < end:
            yield at

    def _detail(self, kind):
        dice = self.dice
        http = dice.choice(["h1", "h2"])
        start = dice.randrange(1 << 20)
        match kind:
            case "get":
                # One in twenty is big, and its client reads it slowly.
                slow = dice.random() < 0.05
                size = 4 << 20 if slow else dice.choice([100, 100, 20_000, 20_000, 1 << 20])
                return {"http": http, "bytes": size, "spread": dice.uniform(1, 6) if slow else 0, "start": start}
            case "post":
                # Some come as fast as they can, some so slowly that a sleep falls into them.
                spread = dice.choice([0, 0, dice.uniform(1, 6)])
                return {"http": http, "framing": dice.choice(["length", "chunked"]), "spread": spread, "start": start}
            case "leave":
                how = dice.choice(["h1", "h1", "h2", "grpc", "upload-h1", "upload-h2"])
                return {"how": how, "framing": dice.choice(["length", "chunked"]), "after": dice.uniform(0.005, 0.6), "start": start}
            case "drop":
                return {"http": http, "method": dice.choice(["GET", "PUT", "DELETE", "POST"]), "how": dice.choice(["end", "reset"])}
            case "cut":
                return {"http": http}
            case "ws-message" | "chat-message" | "grpc":
                # The largest is more than a guest stream's window.
                return {"bytes": dice.choice([10] * 4 + [1000] * 4 + [30_000] * 3 + [600_000]), "start": start, "stream": dice.randrange(2)}
            case "ws-short":
                return {"messages": dice.randrange(1, 4), "start": start}
