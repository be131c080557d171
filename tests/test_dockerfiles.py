"""Every instruction of a Dockerfile, and what comes of it: in the build, in the guest, in the process that is the app.

What is expected is what `docker build` and `docker run` would do. Three images have all of it.
"""
import io
import tarfile
import urllib.parse

import pytest

from harness import images
from harness.microvm import Microvm

BASE = "public.ecr.aws/lambda/microvms:al2023-minimal"
# Says what it is, or what a command says.
APP = images.answering('''
import json, os, subprocess, urllib.parse


def what_i_am():
    with open("/proc/self/cmdline") as command:
        command = command.read().split("\\0")[:-1]
    user = {"uid": os.getuid(), "gid": os.getgid(), "groups": sorted(os.getgroups())}
    return user | {"command": command, "env": dict(os.environ), "cwd": os.getcwd(), "pid": os.getpid(), "root": sorted(os.listdir("/"))}


def answer(path):
    command = urllib.parse.unquote(path[1:])
    said = subprocess.run(["sh", "-c", command], capture_output=True, text=True).stdout if command else what_i_am()
    return json.dumps(said).encode()
''')


def tar(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.uid = len(text), 0o640, 1234
            archive.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def start(node, name, dockerfile, **files):
    """A running microVM of this Dockerfile: asks it for what a command says, or for what its app is."""
    vm = Microvm.run(node, images.build(node, name, images.zip_of(**{"Dockerfile": dockerfile, "app.py": APP} | files)))

    def ask(command=""):
        with vm.http() as client:
            return client.get("/" + urllib.parse.quote(command, safe="")).json()

    return ask


# As people write them, with a comment or a continuation where one may stand.
EVERYTHING = r"""# syntax=docker/dockerfile:1
# escape=\

# A comment.
ARG BASE=%(base)s
ARG STAGE=tools GREETING="hello from above"

FROM --platform=linux/arm64 ${BASE} AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV FROM_BASE=yes
EXPOSE 8080
ENTRYPOINT ["/never"]
CMD ["never"]
ONBUILD ENV TRIGGERED=yes
ONBUILD RUN cat <<EOF >/triggered
by $FROM_BASE
EOF

FROM nosuch.example/image AS unused
RUN exit 1

FROM base AS tools
VOLUME /volume /empty
RUN mkdir /volume && echo made by the tools > /made

FROM scratch AS files
COPY data /data

# A stage by a variable, in the case that people also write.
from $STAGE as app
LABEL org.example.one="1" "with blank"="2 \
    and more" three=3
MAINTAINER somebody <somebody@example.com>
ARG GREETING
ARG OWN=1 OTHER="two words"
ARG UNSET
ENV A=1 B="two words" C=three\ words D='$A'
ENV OLD the old   form
ENV E=${A}-${NOPE:-otherwise}${A:+!} PATH=/srv/bin:$PATH FROM_ARG=$GREETING/$OWN/$OTHER
RUN echo "$A|$B|$C|$D|$OLD|$E|$GREETING|$OWN|$UNSET|$FROM_BASE|$TRIGGERED" > /seen && \
    # Not the end of the step.

    echo "${BASH_VERSION:+bash}" >> /seen
RUN ["sh", "-c", "echo \"exec $A $0\" >> /seen", "form"]
RUN ! (false | true) && echo pipefail >> /seen
RUN <<EOF
useradd --uid 1234 --create-home web
groupadd --gid 777 extra
usermod --append --groups extra web
EOF
RUN cat <<A >/a && cat <<-'B' >/b
$B ${A}
A
	$B
	B
RUN --mount=type=bind,from=files,source=/data,target=/mnt --mount=type=cache,target=/var/cache/mine cp /mnt/deep/one.txt /mounted
WORKDIR /srv
WORKDIR app
COPY app.py .
COPY --chown=web:extra --chmod=0640 t?o.txt data/*/*.txt /globbed/
COPY --link ["with blank.txt", "/with blank"]
COPY --from=files --chown=1234:0 /data/ /data
COPY --from=2 /made /copied
COPY <<'EOF' <<other.txt here/
all of $THIS
EOF
other
other.txt
COPY . /all
ADD tree.tar.gz plain.zip /added/
ADD --chown=web --chmod=600 two.txt /added/
RUN echo inherited > /volume/inherited
VOLUME ["/data"]
RUN echo kept > /data/kept && install --directory --owner web /volume/of-web
STOPSIGNAL SIGQUIT
HEALTHCHECK --interval=1s --start-interval=1s CMD touch /tmp/healthy
USER web
ENTRYPOINT ["python3", "app.py"]
CMD ["one", "$A"]
""".replace("%(base)s", BASE)


@pytest.fixture(scope="module")
def everything(node):
    files = {
        "data/deep/one.txt": "one", "two.txt": "two", "with blank.txt": "blank",
        "plain.zip": images.zip_of(x="1"), "tree.tar.gz": tar(**{"in/side": "tree"}),
        ".dockerignore": "# A comment.\n*.secret\n!kept.secret\n**/*.tmp\nignored/\n",
        "a.secret": "s", "kept.secret": "k", "data/x.tmp": "t", "ignored/file": "i",
    }
    return start(node, "everything", EVERYTHING, **files)


def test_entrypoint_and_cmd_become_the_app(everything):
    """The exec forms, both of them: no shell, no variables; a base's CMD does not survive a new ENTRYPOINT."""
    me = everything()
    assert (me["command"], me["pid"]) == (["python3", "app.py", "one", "$A"], 1)


def test_user_and_workdir_are_the_apps(everything):
    me = everything()
    assert (me["uid"], me["gid"], me["groups"], me["cwd"]) == (1234, 1234, [777], "/srv/app")
    assert me["env"]["HOME"] == "/home/web"


def test_env_reaches_the_app_and_arg_does_not(everything):
    env = everything()["env"]
    expected = {
        "A": "1", "B": "two words", "C": "three words", "D": "$A", "OLD": "the old   form", "E": "1-otherwise!",
        "FROM_BASE": "yes", "TRIGGERED": "yes", "FROM_ARG": "hello from above/1/two words",
    }
    assert {name: env.get(name) for name in expected} == expected
    assert env["PATH"].startswith("/srv/bin:/") and env["PATH"].endswith("/bin")
    assert not {"BASE", "STAGE", "GREETING", "OWN", "OTHER", "UNSET"} & env.keys()


def test_run_has_arg_env_and_its_shell(everything):
    assert everything("cat /seen").splitlines() == [
        "1|two words|three words|$A|the old   form|1-otherwise!|hello from above|1||yes|yes", "bash", "exec 1 form", "pipefail",
    ]


def test_here_documents_are_scripts_input_and_files(everything):
    assert everything("cat /a /b") == "two words 1\n$B\n"
    assert everything("cd /srv/app/here; stat -c '%n %u %a' *; cat *") == "EOF 0 644\nother.txt 0 644\nall of $THIS\nother\n"


def test_stages_give_files_and_triggers(everything):
    """COPY --from a name and a number, a stage from a variable, `scratch`, ONBUILD; a stage that nobody needs is not built."""
    assert everything("cat /made /copied /triggered /mounted /data/deep/one.txt") == "made by the tools\nmade by the tools\nby yes\noneone"
    assert everything("stat -c '%u:%g' /data/deep/one.txt; ls -A /var/cache/mine /mnt | grep .") == "1234:0\n"


def test_copy_and_add(everything):
    assert everything("cd /globbed; stat -c '%n %U:%G %a' *; cat '/with blank'") == "one.txt web:extra 640\ntwo.txt web:extra 640\nblank"
    # A tar is unpacked, with its owners and modes; another archive is a file.
    added = everything("cd /added; stat -c '%n %U %a' in/side plain.zip two.txt")
    assert added.splitlines() == ["in/side web 640", "plain.zip root 644", "two.txt web 600"]


def test_dockerignore_keeps_files_out(everything):
    found = everything("cd /all; find . -type f | LC_ALL=C sort").split("\n")[:-1]
    assert found == ["./" + name for name in [
        ".dockerignore", "Dockerfile", "app.py", "data/deep/one.txt", "kept.secret", "plain.zip", "tree.tar.gz", "two.txt", "with blank.txt",
    ]]


def test_a_volume_is_a_directory_and_nobody_checks_health(everything):
    """As with BuildKit, what is written to a volume after it was declared stays; it is there in the guest even if nothing made it."""
    said = everything("cat /data/kept /volume/inherited; stat -c %U /volume/of-web; ls -d /empty; grep -c volume /proc/mounts; ls /tmp/healthy")
    assert said == "kept\ninherited\nweb\n/empty\n0\n"


def test_shell_form_and_numbers(node):
    """ENTRYPOINT in its shell form is the shell's; CMD does not reach the app. A user and a directory need not be there."""
    dockerfile = f"""FROM {BASE}
ENV WHAT="one two"
COPY app.py /
SHELL ["/bin/bash", "-ec"]
ENTRYPOINT cd /tmp && exec python3 /app.py $WHAT \\
    "$WHAT" "$BASHPID"
CMD ["not", "seen"]
USER 4711:4712
WORKDIR /not/there/yet
"""
    me = start(node, "shell-form", dockerfile)()
    assert me["command"] == ["python3", "/app.py", "one", "two", "one two", "1"]
    assert (me["uid"], me["gid"], me["groups"], me["env"]["HOME"]) == (4711, 4712, [], "/")
    assert (me["cwd"], me["env"]["OLDPWD"]) == ("/tmp", "/not/there/yet")


def test_from_scratch_and_an_entrypoint_taken_back(node):
    """Nothing is in the image that the Dockerfile does not put there: no shell, no passwd, no directory."""
    dockerfile = f"""FROM {BASE} AS base
RUN mkdir /small && cp -L --parents /usr/bin/python3 $(ldd /usr/bin/python3 | grep -o '/[^ ]*') /small && cp -r --parents /usr/lib/python3.11 /small
FROM scratch AS small
COPY --from=base /small /
ENTRYPOINT ["/never"]
FROM small
COPY app.py /
ENTRYPOINT []
CMD ["python3", "/app.py"]
"""
    me = start(node, "from-scratch", dockerfile)()
    assert (me["command"], me["cwd"], me["uid"], me["env"]["HOME"]) == (["python3", "/app.py"], "/", 0, "/root")
    assert me["env"]["PATH"] == "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert me["root"] == ["app.py", "dev", "etc", "lib", "lib64", "lost+found", "proc", "run", "sys", "tmp", "usr"]


@pytest.mark.parametrize("name, steps, reason", [
    ("parents", "\nCOPY --parents app.py /x/", r"line 3 \(COPY --parents app.py /x/\) failed: COPY only supports the --chmod="),
    ("patterns", "ENV A=1\n\nENV B=${A%.*}", r"line 4 \(ENV B=\$\{A%\.\*\}\) failed: Missing ':' in substitution"),
    ("endless", "\nRUN cat <<EOF\nhello", "line 3: its here-document does not end: no line below it is EOF"),
    ("filled-in", "COPY <<EOF /x\nhello $USER\nEOF", "line 2: the here-document EOF of a COPY or ADD has a `\\$`"),
    ("script", "RUN <<EOF\necho its words\nexit 3\nEOF", r"line 2 \(RUN <<EOF\) failed with exit status 3; the last lines of its output:\nits words$"),
    ("nothing", "ENTRYPOINT []", "the Dockerfile needs a CMD or an ENTRYPOINT"),
])
def test_what_cannot_be_built_is_said_with_its_line(node, name, steps, reason):
    with pytest.raises(images.BuildFailed, match=f"CONTAINER_BUILD_FAILED: .*{reason}"):
        images.build(node, f"refused-{name}", images.zip_of(**{"Dockerfile": f"FROM {BASE}\n{steps}\n", "app.py": APP}))
