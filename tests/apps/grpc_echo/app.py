"""A gRPC server with one method of every kind. Messages are plain bytes, so there is no generated code on either side.

Speaks cleartext HTTP/2 with prior knowledge only, as gRPC servers do.
"""
import time
from concurrent import futures

import grpc


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


def sleep(request, context):
    """Answers after that many seconds unless the caller's deadline is over before."""
    end = time.monotonic() + float(request)
    while time.monotonic() < end and context.is_active():
        time.sleep(0.05)
    return b"slept"


def fail(request, context):
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, request.decode())


def serve(address="0.0.0.0:50051"):
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
    methods = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Countdown": grpc.unary_stream_rpc_method_handler(countdown),
        "Total": grpc.stream_unary_rpc_method_handler(total),
        "Chat": grpc.stream_stream_rpc_method_handler(chat),
        "Sleep": grpc.unary_unary_rpc_method_handler(sleep),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("dormouse.Echo", methods),))
    if not server.add_insecure_port(address):
        raise SystemExit(f"cannot listen on {address}")
    server.start()
    return server


if __name__ == "__main__":
    serve().wait_for_termination()
