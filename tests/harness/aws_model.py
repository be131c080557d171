"""AWS's model of the service, as botocore carries it, and whether an answer is one of it to the last member.

botocore itself is lenient: it ignores members that it does not know and takes a null for an absent one. Here an answer may
have the model's members, with the model's types, and those that were recorded from the live service and that the model does
not name; a member that must be there must not be null.
"""
import json
import re

import botocore.session

SERVICE = "lambda-microvms"

# Recorded and in no document: docs/behaviour, aws-behaviour §7.2.
UNDOCUMENTED = {
    "CreateMicrovmImageResponse": {"id", "buildPhaseOverrides", "roleConfiguration"},
    "UpdateMicrovmImageResponse": {"id", "buildPhaseOverrides", "roleConfiguration"},
    "GetMicrovmImageOutput": {"id"},
    "MicrovmImageSummary": {"id"},
    "GetMicrovmImageVersionOutput": {"versionStateTimeBucket"},
    "UpdateMicrovmImageVersionResponse": {"versionStateTimeBucket"},
    "MicrovmImageVersionSummary": {"versionStateTimeBucket"},
    "GetMicrovmImageBuildOutput": {"terminationReasonCode"},
    "MicrovmImageBuildSummary": {"terminationReasonCode"},
    "RunMicrovmResponse": {"terminationReasonCode"},
    "GetMicrovmResponse": {"terminationReasonCode"},
}
# The live service breaks its own pattern here: its reasons are sentences (aws-behaviour §3.5).
SENTENCES = {"stateReason"}
# What every AWS service may answer before an operation is looked at: status and members.
FRAMEWORK = {
    "MissingAuthenticationTokenException": 403, "IncompleteSignatureException": 403, "InvalidSignatureException": 403,
    "UnrecognizedClientException": 403, "UnknownOperationException": 404, "SerializationException": 400, "RequestTooLargeException": 413,
}


def model():
    return botocore.session.get_session().get_service_model(SERVICE)


def surprises(operation, status, headers, body):
    """What is wrong with an answer (headers with lower-case names, body as bytes), as sentences; none if all is well."""
    if status >= 300:
        return _refusal(operation, status, headers, body)
    found = []
    expected = operation.http.get("responseCode", 200)
    if status != expected:
        found.append(f"the status is {status} and not {expected}")
    if status == 204:
        return found + ([f"a 204 has a body: {body!r}"] if body else [])
    if headers.get("content-type") != "application/json":
        found.append(f"the content type is {headers.get('content-type')}")
    if not headers.get("x-amzn-requestid"):
        found.append("there is no x-amzn-requestid")
    _value(operation.output_shape, json.loads(body), "", found)
    return found


def _refusal(operation, status, headers, body):
    kind = headers.get("x-amzn-errortype")
    if not kind:
        return ["a refusal without x-amzn-errortype is a generic error to every SDK"]
    found, told = [], json.loads(body)
    shape = next((shape for shape in operation.error_shapes if shape.name == kind), None)
    if shape is None:
        if FRAMEWORK.get(kind) != status:
            found.append(f"{operation.name} does not declare {kind} (with {status})")
        if not set(told) <= {"message", "Message"}:
            found.append(f"{kind} has the members {sorted(told)}")
        return found
    if shape.metadata["error"]["httpStatusCode"] != status:
        found.append(f"{kind} came with {status} and not {shape.metadata['error']['httpStatusCode']}")
    in_body = {name for name, member in shape.members.items() if not member.serialization.get("location")}
    if set(told) - in_body:
        found.append(f"{kind} has members that its model does not: {sorted(set(told) - in_body)}")
    for name in in_body & set(told):
        if told[name] is not None:
            _value(shape.members[name], told[name], name, found)
    if "retryAfterSeconds" in shape.members and not headers.get("retry-after", "").isdigit():
        found.append(f"{kind} does not say in whole seconds when to try again: {headers.get('retry-after')!r}")
    return found


def _value(shape, value, path, found):
    fault = lambda what: found.append(f"{path or 'the body'} ({shape.name}) {what}")
    kind = shape.type_name
    if kind == "structure":
        if not isinstance(value, dict):
            return fault(f"is no object: {value!r}")
        unknown = set(value) - set(shape.members) - UNDOCUMENTED.get(shape.name, set())
        if unknown:
            fault(f"has members that nobody has seen at AWS: {sorted(unknown)}")
        for name in shape.required_members:
            if value.get(name) is None:
                fault(f"lacks {name}")
        is_set = [name for name in shape.members if value.get(name) is not None]
        if shape.metadata.get("union") and len(is_set) != 1:
            fault(f"is a union with {len(is_set)} members set")
        for name in is_set:
            _value(shape.members[name], value[name], f"{path}.{name}".lstrip("."), found)
    elif kind == "list":
        if not isinstance(value, list):
            return fault(f"is no list: {value!r}")
        _length(shape, len(value), fault)
        for number, item in enumerate(value):
            _value(shape.member, item, f"{path}[{number}]", found)
    elif kind == "map":
        if not isinstance(value, dict):
            return fault(f"is no map: {value!r}")
        _length(shape, len(value), fault)
        for name, item in value.items():
            _value(shape.key, name, f"a key of {path}", found)
            _value(shape.value, item, f"{path}.{name}", found)
    elif kind == "string":
        if not isinstance(value, str):
            return fault(f"is no text: {value!r}")
        _length(shape, len(value), fault)
        if shape.enum and value not in shape.enum:
            fault(f"is none of {shape.enum}: {value!r}")
        pattern = shape.metadata.get("pattern")
        if pattern and r"\p" not in pattern and path.rsplit(".", 1)[-1] not in SENTENCES and not re.fullmatch(pattern, value):
            fault(f"does not fit {pattern}: {value!r}")
    elif kind == "timestamp":
        if not isinstance(value, float):
            fault(f"is not epoch seconds with a fraction: {value!r}")
    elif kind == "boolean":
        if not isinstance(value, bool):
            fault(f"is no boolean: {value!r}")
    elif kind in ("integer", "long"):
        if not isinstance(value, int) or isinstance(value, bool):
            fault(f"is no whole number: {value!r}")
    else:
        raise NotImplementedError(f"{shape.name} is a {kind}")


def _length(shape, length, fault):
    if not shape.metadata.get("min", 0) <= length <= shape.metadata.get("max", length):
        fault(f"has the length {length}")


def watch(client, seen):
    """Every answer that a boto3 client reads from now on must be one of the model; `seen` gets (operation, status)."""
    def look(operation_model, response_dict, **_):
        headers = {name.lower(): value for name, value in response_dict["headers"].items()}
        seen.append((operation_model.name, response_dict["status_code"]))
        wrong = surprises(operation_model, response_dict["status_code"], headers, response_dict["body"])
        assert not wrong, f"{operation_model.name} answered {response_dict['status_code']} {response_dict['body'][:2000]!r}: {'; '.join(wrong)}"

    client.meta.events.register(f"before-parse.{SERVICE}", look)
    return client
