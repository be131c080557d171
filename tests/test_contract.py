"""The wake contract, short: load-tests/contract.py runs the same for as long as one likes.

Three microVMs, one of which never sleeps, under every protocol for a minute. Nothing is asserted of how long anything takes:
a gRPC call that misses its deadline of 5 s on a busy machine is counted and is no fault.
"""
import pytest

from harness import contract
from harness.contract.plan import Plan

SEED = 4


@pytest.fixture(scope="module")
def contract_image(node, wheels):
    return contract.build_image(node, wheels)


# A minute of traffic, three launches, and the wait for everything to be over.
@pytest.mark.timeout(900)
def test_nothing_is_lost_doubled_or_unexpected_while_a_fleet_flaps(node, contract_image):
    plan = Plan(SEED, seconds=45, microvms=3, load=0.5)
    verdict = contract.run(node, contract_image, plan)
    assert not verdict.surprises, f"seed {plan.seed}: {len(verdict.surprises)} surprises\n" + "\n".join(verdict.describe())
    wakes = verdict.deltas["idle_wakes_total"].get("started", 0)
    assert wakes, f"no microVM of the fleet slept and woke, so that nothing was shown: {verdict.deltas}"
    assert verdict.left and verdict.left_asleep, "no client left while it was held, or while its microVM slept"
