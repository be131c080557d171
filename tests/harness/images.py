"""From a directory with a Dockerfile to an image, through S3 and the control API as an integrator does it."""
import io
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from .waiting import eventually

# The article's app is the demo's.
ARTICLE_APP = Path(__file__).parents[2] / "demo" / "app"
# The guests of the tests.
APPS = Path(__file__).parents[1] / "apps"
BUCKET = "artifacts"
BUILT_WITHIN = 420
ROLE = "arn:aws:iam::123456789012:role/MicroVMBuildRole"
# The smallest size: the tests run on two cores with software emulation.
MEMORY_MIB = 512


class BuildFailed(AssertionError):
    """The build's own words."""


def zip_of(*directories, **files):
    """A zip of everything in the directories, and of the given files; as bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for directory in directories:
            for path in sorted(Path(directory).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    archive.write(path, path.relative_to(directory))
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def answering(source):
    """An app in one file, as text: `source` has a function `answer`, from the path of a request to the body of what it is answered."""
    return source + '''

import http.server


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = answer(self.path)
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


http.server.ThreadingHTTPServer(("", 8080), Handler).serve_forever()
'''


def app(name, *directories):
    """The zip of an app of apps/ that uses what is shared there, the Dockerfile included."""
    return zip_of(APPS / "shared", APPS / name, *directories)


def grpc_wheels(directory):
    """grpcio for the guest, of the version that the tests themselves use."""
    return wheels(directory / "wheels", f"grpcio=={metadata.version('grpcio')}")


def wheels(wanted, *packages):
    """Packages for the guest, unpacked: the guest's Python is Debian 12's, and a build has no package registry."""
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--target", wanted / "vendor",
         "--only-binary", ":all:", "--platform", "manylinux_2_17_x86_64", "--platform", "manylinux2014_x86_64",
         "--python-version", "3.11", *packages],
        check=True, stdin=subprocess.DEVNULL,
    )
    return wanted


def base_image_arn(region):
    return f"arn:aws:lambda:{region}:aws:microvm-image:al2023-1"


def upload(node, key, archive):
    """Puts a zip where images are built from."""
    s3 = node.client("s3")
    if BUCKET not in [bucket["Name"] for bucket in s3.list_buckets().get("Buckets", [])]:
        s3.create_bucket(Bucket=BUCKET)
    s3.put_object(Bucket=BUCKET, Key=f"{key}.zip", Body=archive)


def start_build(node, name, archive, memory_mib=MEMORY_MIB, **request):
    """Uploads the zip and asks for an image; returns its ARN while the build goes on."""
    upload(node, name, archive)
    client = node.client()
    answer = client.create_microvm_image(
        name=name,
        codeArtifact={"uri": f"s3://{BUCKET}/{name}.zip"},
        baseImageArn=base_image_arn(client.meta.region_name),
        buildRoleArn=ROLE,
        resources=[{"minimumMemoryInMiB": memory_mib}],
        **request,
    )
    assert answer["state"] == "CREATING", f"a new image should be CREATING, it is {answer['state']}"
    return answer["imageArn"]


def finish_build(node, arn):
    """Waits for the image; a failed build raises with the reason that the API gives."""
    client = node.client()

    def settled():
        state = client.get_microvm_image(imageIdentifier=arn)["state"]
        return state if state != "CREATING" else None

    state = eventually(f"the image {arn} to be built", settled, within=BUILT_WITHIN, every=0.5)
    if state != "CREATED":
        raise BuildFailed(f"{state}: {failure_reason(node, arn)}")
    return arn


def build(node, name, archive, **request):
    """Both, one after the other."""
    return finish_build(node, start_build(node, name, archive, **request))


def failure_reason(node, arn):
    """What the API says of a failed build: AWS puts it on the build (aws-behaviour §5.1)."""
    client = node.client()
    builds = client.list_microvm_image_builds(imageIdentifier=arn, imageVersion="1.0")["items"]
    return "; ".join(build.get("stateReason") or "" for build in builds)
