"""The wake contract, driven: a fleet of microVMs that flaps between asleep and awake under an open-loop mix of every protocol.

    plan.py     what is sent when, drawn from a seed before the first byte is sent
    play.py     sends it, with clients that nobody here wrote, and writes down what came back
    judge.py    compares that with the guests' ledgers, the node's metrics and its log
    leaving.py  clients that hang up while they are held, or while their microVM sleeps

`load-tests/contract.py` runs it long and reports; `tests/test_contract.py` runs it short.
"""
import asyncio

from ..images import app, build
from ..microvm import PATIENT, Microvm
from .judge import Verdict
from .leaving import leave_in_the_hold, leave_while_asleep
from .plan import IDLE, Plan
from .play import Player

# The shortest that the node takes (see harness/node.py).
RESTLESS = PATIENT | {"maxIdleDurationSeconds": 1}


def build_image(node, wheels):
    """The image of apps/contract; `wheels` is a directory with grpcio, unpacked (see harness/images.py)."""
    return build(node, "contract", app("contract", wheels))


def run(node, image, plan):
    """Plays the plan on microVMs of its own and ends them; the verdict."""
    fleet = [Microvm.run(node, image, idle=RESTLESS if mode in IDLE else PATIENT) for mode in plan.modes]
    try:
        verdict = Verdict(node, fleet, plan)
        player = Player(node, fleet, plan)
        asyncio.run(player.play())
        verdict.judge(player)
        verdict.left = leave_in_the_hold(node, fleet[-1], verdict)
        verdict.left_asleep = leave_while_asleep(node, fleet[-1], verdict)
        verdict.settle()
        return verdict
    finally:
        for vm in fleet:
            node.client().terminate_microvm(microvmIdentifier=vm.id)
