"""gRPC over the endpoint: every kind of call, deadlines, errors and trailers, with grpcio on both sides.

The gRPC server in the guest speaks HTTP/2 only, so calls ask for it with X-aws-proxy-force-h2, as AWS documents.
"""
import threading

import grpc
import pytest

SERVICE = "/dormouse.Echo/"
PORT = 50051


@pytest.fixture(scope="module")
def vm(polyglot):
    return polyglot


class Caller:
    """A channel to one microVM with the metadata that every call carries; `metadata` replaces the token and the port."""

    def __init__(self, vm, force_h2=True, port=PORT, metadata=None):
        credentials = grpc.ssl_channel_credentials(vm.node.ca.read_bytes())
        # grpc brings its own resolver, which need not know *.localhost: connect by address, and name the host in TLS and
        # in :authority as a DNS entry would have done.
        options = [("grpc.ssl_target_name_override", vm.host), ("grpc.default_authority", vm.endpoint), ("grpc.enable_retries", 0)]
        self.channel = grpc.secure_channel(f"127.0.0.1:{vm.node.edge_port}", credentials, options)
        self.metadata = [("x-aws-proxy-auth", vm.token(port)), ("x-aws-proxy-port", str(port))] if metadata is None else list(metadata)
        if not any(name == "x-aws-proxy-port" for name, _ in self.metadata):
            self.metadata.append(("x-aws-proxy-port", str(port)))
        if force_h2:
            self.metadata.append(("x-aws-proxy-force-h2", "true"))

    def __getattr__(self, kind):
        method = getattr(self.channel, kind)
        return lambda name, *request, timeout=120: method(SERVICE + name)(*request, metadata=self.metadata, timeout=timeout)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()


@pytest.fixture
def call(vm):
    with Caller(vm) as caller:
        yield caller


def test_unary(call):
    assert call.unary_unary("Unary", b"hello") == b"echo:hello"
    big = b"x" * 2_000_000
    assert call.unary_unary("Unary", big) == b"echo:" + big


def test_unary_without_the_force_header(vm):
    """Measured on AWS: a unary call completes with its trailers with and without the header (aws-behaviour §1.4)."""
    with Caller(vm, force_h2=False) as caller:
        assert caller.unary_unary("Unary", b"hello") == b"echo:hello"


def test_trailers_arrive(vm, call):
    _, finished = call.channel.unary_unary(SERVICE + "Unary").with_call(b"x", metadata=call.metadata, timeout=60)
    assert ("x-served-by", "guest") in [(key, value) for key, value in finished.trailing_metadata()]


def test_server_streaming(call):
    assert list(call.unary_stream("Countdown", b"50")) == [b"%d" % number for number in range(50, 0, -1)]


def test_client_streaming(call):
    assert call.stream_unary("Total", iter([b"1", b"2", b"39"])) == b"42"


def test_both_sides_at_once(call):
    """Each message is sent only when the answer to the one before is here: nothing may be kept back in between."""
    turn = threading.Semaphore(1)

    def questions():
        for number in range(5):
            assert turn.acquire(timeout=60)
            yield b"question %d" % number

    answers = []
    for answer in call.stream_stream("Chat", questions()):
        answers.append(answer)
        turn.release()
    assert answers == [b"%d:question %d" % (number + 1, number) for number in range(5)]


def test_a_deadline_is_kept(call):
    with pytest.raises(grpc.RpcError) as late:
        call.unary_unary("Sleep", b"30", timeout=1)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert call.unary_unary("Unary", b"still here") == b"echo:still here"


def test_an_error_of_the_app_arrives_with_its_words(call):
    with pytest.raises(grpc.RpcError) as failed:
        call.unary_unary("Fail", b"not today")
    assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "not today")


def test_a_call_wakes_a_sleeper(node, vm):
    vm.suspend()
    wakes = node.wakes()
    with Caller(vm) as caller:
        assert caller.unary_unary("Unary", b"good morning") == b"echo:good morning"
    assert node.wakes() == wakes + 1


def test_a_conversation_outlives_a_sleep(node, vm):
    """The stream is parked: the node keeps its end, the guest keeps the other in its frozen memory."""
    slept = threading.Event()

    def questions():
        yield b"before"
        assert slept.wait(120)
        yield b"after"

    with Caller(vm) as caller:
        answers = caller.stream_stream("Chat", questions())
        assert next(answers) == b"1:before"
        vm.suspend()
        slept.set()
        assert next(answers) == b"2:after"
        assert list(answers) == []
