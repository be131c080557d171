"""The systemd unit of docs/, as far as systemd can judge it without running it."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[1] / "docs" / "dormouse.service"
# What it is today, in tenths of systemd's exposure level: a node makes cgroups, namespaces, users and devices for its guests.
EXPOSURE = 98

pytestmark = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="NOT TESTED: there is no systemd-analyze here (Debian: apt-get install systemd)")


@pytest.fixture
def analyze(tmp_path):
    """Looks at the unit, with the node's binary in its place."""
    def look(*arguments, change=lambda text: text):
        unit = tmp_path / "dormouse.service"
        unit.write_text(change(UNIT.read_text().replace("/usr/local/bin/dormouse", os.environ["DORMOUSE_BIN"])))
        run = subprocess.run(["systemd-analyze", *arguments, unit], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
        return run.returncode, run.stdout + run.stderr

    return look


def test_systemd_understands_every_line(analyze):
    assert analyze("verify") == (0, "")
    code, words = analyze("verify", change=lambda text: text.replace("KillMode=process", "KillMode=proces"))
    assert "proces" in words, f"a wrong line is told: {code} {words}"


def test_it_is_exposed_no_more_than_it_was(analyze):
    code, words = analyze("security", "--offline=true", f"--threshold={EXPOSURE}")
    assert code == 0, words


def test_what_it_calls_is_there():
    service = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#"))
    arguments = service["ExecStart"].split()[1:]
    shown = subprocess.run([os.environ["DORMOUSE_BIN"], arguments[0], "--help"], capture_output=True, text=True, check=True).stdout
    assert all(argument in shown for argument in arguments if argument.startswith("--")), f"{arguments} of {shown}"
