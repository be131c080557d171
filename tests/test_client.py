"""The commands for people without the AWS CLI: the real binary, as a person or a script runs it."""
import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import threading

import pytest

from harness import images
from harness.node import binary
from harness.waiting import eventually

WITHIN = 120
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "DORMOUSE_CA", "DORMOUSE_EDGE"))}
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()=>][0-9A-B]?")


def dormouse(node, *arguments, check=True, environment=None, within=WITHIN, **options):
    """One command, with --data-dir, or with the variables of `dormouse env`."""
    where = () if environment else ("--data-dir", node.data_dir)
    command = [binary(), *arguments, *where]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=within, env=CLEAN | (environment or {}), **options)
    if check:
        assert done.returncode == 0, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def told(node, *arguments, **options):
    return json.loads(dormouse(node, *arguments, "--json", **options).stdout)


@pytest.fixture(scope="module")
def app(node, tmp_path_factory):
    """A directory as a person has it, built by the command: its image's name, and what the command said."""
    directory = tmp_path_factory.mktemp("app")
    for path in images.ARTICLE_APP.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    (directory / ".dockerignore").write_text("secrets\n*.log\n")
    (directory / "secrets").mkdir()
    (directory / "secrets" / "key").write_text("not for anybody")
    (directory / "noise.log").write_text("noise")
    dockerfile = (directory / "Dockerfile").read_text()
    # The build shows what came with it.
    (directory / "Dockerfile").write_text(dockerfile.replace("CMD", "COPY . /context\nRUN ls -AR /context\nCMD", 1))
    built = dormouse(node, "image", "build", str(directory), "--name", "by-hand", "--memory", "512", within=420)
    return directory, built


@pytest.fixture(scope="module")
def vm(node, app):
    """A microVM of it that lets shells in: its id."""
    done = dormouse(node, "run", "by-hand", "--idle", "3600", "--shell")
    assert "RUNNING" not in done.stdout and "dormouse open" in done.stderr, done
    yield done.stdout.strip()
    dormouse(node, "rm", done.stdout.strip())


def test_an_image_is_built_from_a_directory_with_progress(node, app):
    directory, built = app
    assert built.stdout == "by-hand 1.0 SUCCESSFUL\n", built
    assert "STEP 1" in built.stderr and "The image is ready." in built.stderr, "the build's own words, as they come"
    assert re.search(r"^\.dockerignore$", built.stderr, re.M) and re.search(r"^app\.py$", built.stderr, re.M), built.stderr
    assert "secrets" not in built.stderr and "noise.log" not in built.stderr, "what .dockerignore names is left out"
    listed = {image["name"]: image for image in told(node, "image", "ls")}
    assert listed["by-hand"]["latestActiveImageVersion"] == "1.0"
    assert re.search(r"^by-hand +CREATED +1\.0 ", dormouse(node, "image", "ls").stdout, re.M)
    assert dormouse(node, "image", "logs", "by-hand", "--tail", "1").stdout == "dormouse: The image is ready.\n"

    (directory / "Dockerfile").rename(directory / "Dockerfile.away")
    refused = dormouse(node, "image", "build", str(directory), "--name", "by-hand", check=False)
    (directory / "Dockerfile.away").rename(directory / "Dockerfile")
    assert refused.returncode == 1 and "has no Dockerfile" in refused.stderr and refused.stdout == "", refused


def test_a_failed_build_says_why(node, tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM public.ecr.aws/lambda/microvms:al2023-minimal\nRUN echo this is why; exit 3\n")
    failed = dormouse(node, "image", "build", str(tmp_path), "--name", "cannot-be", check=False, within=420)
    assert failed.returncode == 1 and failed.stdout == "", failed
    assert "the build of cannot-be 1.0 is FAILED: CONTAINER_BUILD_FAILED" in failed.stderr and failed.stderr.endswith("this is why\n"), failed.stderr


def test_a_microvm_is_called_as_open_says_and_sleeps_and_wakes(node, vm):
    short = vm[:16]  # microvm- and eight digits.
    listed = told(node, "ps")
    assert vm in [item["microvmId"] for item in listed]
    line = next(line for line in dormouse(node, "ps").stdout.splitlines() if vm in line)
    assert "by-hand" in line and "RUNNING" in line, line

    def call():
        command = dormouse(node, "open", short).stdout.strip()
        assert command.startswith("curl --cacert "), command
        token = re.search(r"X-aws-proxy-auth: (.+)", command)[1]
        node.minted.append(token)
        assert token not in command.splitlines()[0], "what stands on curl's command line is shown by ps"
        # As `dormouse open … | sh`: the shell reads the here-document from the same pipe as the command.
        piped = command.replace("curl", "curl -sS --noproxy '*'", 1)
        answer = subprocess.run(["sh"], input=piped, capture_output=True, text=True, timeout=60)
        assert answer.returncode == 0, answer.stderr
        return json.loads(answer.stdout)

    before = call()
    assert dormouse(node, "suspend", short).stdout.strip() == vm
    assert told(node, "resume", vm[len("microvm-"):16])["state"] == "RUNNING", "the digits alone are enough"
    dormouse(node, "suspend", short)
    assert call()["requests_served"] == before["requests_served"] + 1

    token = told(node, "token", short, "--port", "9000-9010", "--port", "all", "--minutes", "1")
    node.minted.append(token["token"])
    assert token["microvmId"] == vm and token["header"] == "X-aws-proxy-auth" and token["token"].count(".") == 4
    usage = told(node, "usage", short)
    assert usage["microvmId"] == vm and usage["usage"]["runningSeconds"] > 0
    text = dormouse(node, "usage").stdout
    assert vm in text and re.search(r"^by-hand .*\$0\.\d{6}$", text, re.M), text


def test_logs_are_followed(node, vm):
    command = [binary(), "logs", "-f", vm[:20], "--data-dir", node.data_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as following:
        try:
            seen = []
            threading.Thread(target=lambda: seen.extend(following.stdout), daemon=True).start()
            opened = dormouse(node, "open", vm).stdout.strip()
            node.minted.append(re.search(r"X-aws-proxy-auth: (.+)", opened)[1])
            subprocess.run(["bash", "-c", opened.replace("curl", "curl -sS --noproxy '*'", 1)], capture_output=True, timeout=60)
            eventually("the request in the app's log", lambda: any("GET /" in line for line in seen), within=30)
            following.send_signal(signal.SIGINT)
            following.wait(timeout=30)
        finally:
            following.kill()
    assert "GET /" in dormouse(node, "logs", vm, "--tail", "1").stdout
    assert told(node, "logs", vm, "-n", "1")["log"].count("\n") == 1


def test_it_works_with_nothing_but_the_environment(node, vm, tmp_path):
    assert vm in dormouse(node, "ps", environment=node.environment, cwd=tmp_path).stdout
    partly = {name: value for name, value in node.environment.items() if name != "AWS_SECRET_ACCESS_KEY"}
    refused = dormouse(node, "ps", environment=partly, check=False, cwd=tmp_path)
    assert refused.returncode == 1 and "AWS_SECRET_ACCESS_KEY" in refused.stderr and "dormouse env" in refused.stderr
    wrong = dormouse(node, "ps", environment=node.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"}, check=False, cwd=tmp_path)
    assert wrong.returncode == 1 and "signature" in wrong.stderr, wrong
    gone = dormouse(node, "ps", environment=node.environment | {"AWS_ENDPOINT_URL_LAMBDA_MICROVMS": "http://127.0.0.1:9"}, check=False, cwd=tmp_path)
    assert gone.returncode == 1 and "is the node running?" in gone.stderr, gone
    nowhere = subprocess.run([binary(), "ps"], cwd=tmp_path, env=CLEAN, capture_output=True, text=True, timeout=30)
    assert nowhere.returncode == 1 and "there is no node to talk to" in nowhere.stderr and nowhere.stdout == "", nowhere


def test_what_is_wrong_is_said_and_ends_with_a_code(node, vm, kitchen):
    for arguments, code, said in (
        (["logs", "microvm-ffffffff"], 1, "no microVM's id begins with"),
        (["logs", "microvm-"], 1, "microVMs have ids that begin with microvm-"),
        (["suspend", "microvm-00000000-0000-4000-8000-000000000000"], 1, "MicroVM not found"),
        (["run", "no-such-image"], 1, "no-such-image"),
        (["token", vm, "--port", "http"], 1, "is no port"),
        (["token", vm, "--minutes", "61"], 1, "60"),
        (["image", "rm", "no-such-image"], 1, "no-such-image"),
        (["logs", vm, "--tail", "0"], 2, "--tail"),
        (["run"], 2, "IMAGE"),
        (["run", "by-hand", "--no-wake"], 2, "--idle"),
        (["rm"], 2, "MICROVMS"),
    ):
        done = dormouse(node, *arguments, check=False)
        assert done.returncode == code and said in done.stderr, f"{arguments}: {done}"
        assert done.stdout == "", f"{arguments}: errors are on standard error"


def test_completions_are_scripts(tmp_path):
    for shell, check in (("bash", ["bash", "-n"]), ("zsh", None), ("fish", None)):
        script = subprocess.run([binary(), "completions", shell], capture_output=True, text=True, timeout=30)
        assert script.returncode == 0 and "suspend" in script.stdout, script.stderr
        if check:
            assert subprocess.run(check, input=script.stdout, text=True, timeout=30).returncode == 0
    listed = subprocess.run(
        ["bash", "-c", 'source <("$0" completions bash); COMP_WORDS=(dormouse sus); COMP_CWORD=1; _dormouse dormouse sus; echo "${COMPREPLY[@]}"', binary()],
        capture_output=True, text=True, timeout=30,
    )
    assert listed.stdout.strip() == "suspend", listed


class Terminal:
    """A person's terminal, with `dormouse shell` in it."""

    def __init__(self, node, vm):
        self.master, slave = pty.openpty()
        self.resize(100, 30)
        self.cooked = termios.tcgetattr(slave)
        self.process = subprocess.Popen(
            [binary(), "shell", vm, "--data-dir", node.data_dir], stdin=slave, stdout=slave, stderr=slave, env=CLEAN, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.slave = slave
        self.seen = b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        with contextlib.suppress(OSError):
            while piece := os.read(self.master, 4096):
                self.seen += piece

    def resize(self, columns, rows):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self.master, text.encode())

    def shows(self, wanted):
        eventually(f"the terminal to show {wanted!r}", lambda: wanted in self.text() or None, within=60)

    def text(self):
        return ESCAPES.sub(b"", self.seen).decode(errors="replace")

    def ends(self):
        code = self.process.wait(60)
        assert termios.tcgetattr(self.slave)[:4] == self.cooked[:4], "the terminal's mode is put back"
        return code


def test_a_shell_is_a_terminal_with_its_size(node, vm):
    terminal = Terminal(node, vm)
    terminal.type("echo begin-$((40+2)); stty size\n")
    terminal.shows("begin-42\r\n30 100\r\n")
    terminal.resize(77, 21)
    # What is typed may overtake the signal of a terminal that has another size; a person sees that and asks again.
    def asked_again():
        terminal.type("echo again-$((40+2)); stty size\n")
        return "again-42\r\n21 77\r\n" in terminal.text() or None

    eventually("the new size to be known", asked_again, within=60, every=0.5)
    # Keys go to the guest: Ctrl-C ends what runs there, and not us.
    # What was typed is shown before it runs; Ctrl-C so early would end nothing.
    terminal.type("sh -c 'echo runs-$((40+2)); exec sleep 1000'\n")
    terminal.shows("runs-42\r\n")
    terminal.type("\x03")
    terminal.type("echo alive-$((40+2))\n")
    terminal.shows("alive-42\r\n")
    terminal.type("exit\n")
    assert terminal.ends() == 0, terminal.text()

    left = Terminal(node, vm)
    left.type("echo there-$((40+2))\n")
    left.shows("there-42\r\n")
    left.type("\x1d")
    assert left.ends() == 0 and "left the shell" in left.text()


def test_a_script_is_piped_into_a_shell(node, vm):
    done = subprocess.run(
        [binary(), "shell", vm, "--data-dir", node.data_dir], input="echo piped-$((40+2))\n", capture_output=True, text=True, timeout=60, env=CLEAN,
    )
    assert done.returncode == 0 and "piped-42" in done.stdout, done


def test_a_microvm_without_shell_has_none(node, kitchen):
    refused = dormouse(node, "shell", kitchen.id, check=False)
    assert refused.returncode == 1 and "SHELL_INGRESS" in refused.stderr, refused


def test_an_image_is_built_again_and_removed(node, tmp_path):
    for name in ("app.py", "Dockerfile"):
        (tmp_path / name).write_bytes((images.ARTICLE_APP / name).read_bytes())
    build = ["image", "build", str(tmp_path), "--name", "again", "--memory", "512"]
    assert dormouse(node, *build, within=420).stdout == "again 1.0 SUCCESSFUL\n"
    again = told(node, *build, "--env", "COLOUR=blue", within=420)
    assert (again["imageVersion"], again["state"]) == ("2.0", "SUCCESSFUL"), again
    assert dormouse(node, "image", "rm", "again").stdout == "again\n"
    assert "again" not in [image["name"] for image in told(node, "image", "ls")]
    gone = dormouse(node, "image", "logs", "again", check=False)
    assert gone.returncode == 1 and "again" in gone.stderr, gone


def test_microvms_are_removed(node, app):
    first, second = (dormouse(node, "run", "by-hand").stdout.strip() for _ in range(2))
    ended = told(node, "rm", first, second[:18])
    assert [view["state"] for view in ended] == ["TERMINATED"] * 2
    assert first not in dormouse(node, "ps").stdout and first in dormouse(node, "ps", "--all").stdout
    assert "Hello" not in dormouse(node, "logs", first).stderr
