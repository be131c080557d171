"""A node killed at a step of its own choosing: `stepper.c` counts the steps that outlive the process, and kills it at one."""
import subprocess
from pathlib import Path
from typing import NamedTuple

# Compiling takes a second; arming, milliseconds.
ARMED_WITHIN = 30


class Step(NamedTuple):
    """A step of a node's process: the number that it has in its run, its name, on what."""

    number: int
    name: str
    on: str

    @property
    def kind(self):
        """Steps of one kind differ in names that are made up."""
        last = Path(self.on.split(" -> ")[-1])
        return (self.name, last.name if self.name == "command" or len(last.name) < 16 else last.parent.name)

    def __str__(self):
        return f"step {self.number}, {self.name} {self.on}"


class Kill(NamedTuple):
    """Where to kill: `when` is before or after."""

    when: str
    number: int


def compile_stepper(directory):
    """The tracer, from its source beside this file."""
    program = Path(directory) / "stepper"
    source = Path(__file__).with_name("stepper.c")
    subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", program, source], check=True, stdin=subprocess.DEVNULL)
    return program


class Tracer:
    """Watches a process from the moment this is made until `let_go`, or until the process ends. With a Kill it ends it."""

    def __init__(self, program, pid, directory, log, kill=None):
        self.log = Path(log)
        at = [kill.when, str(kill.number)] if kill else []
        self.process = subprocess.Popen([program, str(pid), directory, self.log, *at], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = self.process.stdout.readline()
        if said != "armed\n":
            self.process.kill()
            raise RuntimeError(f"the stepper did not arm, is ptrace allowed here? It said {said!r} {self.process.stderr.read()!r}")

    def let_go(self):
        """The process goes on untraced (or has ended); the steps that were seen."""
        self.process.stdin.close()
        code = self.process.wait(ARMED_WITHIN)
        said = self.process.stderr.read()
        self.process.stdout.close()
        self.process.stderr.close()
        assert code == 0, f"the stepper ended with {code}: {said}"
        return self.steps()

    def steps(self):
        lines = [line.split("\t") for line in self.log.read_text(errors="replace").splitlines()]
        return [Step(int(number), name, on) for number, _, name, on in lines]
