"""A gRPC server with one method of every kind, in the clear (HTTP/2 with prior knowledge, as gRPC servers do) and over TLS;
and beside it the web app of web.py. Messages are plain bytes, so there is no generated code on either side.
"""
import collections
import json
import threading
import time
from concurrent import futures
from pathlib import Path

import grpc

import web

HERE = Path(__file__).parent
# What became of calls that ended before their answer.
left = collections.Counter()


def unary(request, context):
    context.set_trailing_metadata((("x-served-by", "guest"),))
    return b"echo:" + request


def countdown(request, context):
    for number in range(int(request), 0, -1):
        yield b"%d" % number


def total(requests, context):
    return b"%d" % sum(int(request) for request in requests)


def chat(requests, context):
    for number, request in enumerate(requests, 1):
        yield b"%d:%s" % (number, request)


def linger(request, context):
    """Says that it has begun and nothing more; counts under the name it is sent when its caller has left."""
    gone = threading.Event()
    context.add_callback(gone.set)
    yield b"begun"
    gone.wait()
    left[request.decode()] += 1


def sleep(request, context):
    """Answers after that many seconds unless the caller leaves before; `seconds name` counts that under the name."""
    seconds, _, name = request.decode().partition(" ")
    gone = threading.Event()
    context.add_callback(gone.set)
    if gone.wait(float(seconds)):
        left[name] += 1
    return b"slept"


def leavers(request, context):
    return json.dumps(left).encode()


def patience(request, context):
    """How long this call may take, as far as the app was told."""
    remaining = context.time_remaining()
    # Without a deadline grpcio counts down from the end of its clock.
    return b"for ever" if remaining is None or remaining > 1e6 else b"%d" % remaining


def fail(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, request.decode())


def serve(address="0.0.0.0:50051", tls_address="0.0.0.0:50052"):
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=32))
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Countdown": grpc.unary_stream_rpc_method_handler(countdown),
        "Total": grpc.stream_unary_rpc_method_handler(total),
        "Chat": grpc.stream_stream_rpc_method_handler(chat),
        "Linger": grpc.unary_stream_rpc_method_handler(linger),
        "Sleep": grpc.unary_unary_rpc_method_handler(sleep),
        "Leavers": grpc.unary_unary_rpc_method_handler(leavers),
        "Patience": grpc.unary_unary_rpc_method_handler(patience),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("dormouse.Echo", methods),))
    identity = grpc.ssl_server_credentials([((HERE / "key.pem").read_bytes(), (HERE / "certificate.pem").read_bytes())])
    if not server.add_insecure_port(address) or not server.add_secure_port(tls_address, identity):
        raise SystemExit(f"cannot listen on {address} and {tls_address}")
    server.start()
    return server


if __name__ == "__main__":
    # Before the gRPC port listens: with that the image is ready.
    web.serve()
    serve().wait_for_termination()
