"""botocore's model of the service as an OpenAPI document, made when it is needed: AWS's file is not ours to keep."""

from . import aws_model

# What a path means, so that not every example ends at "there is no such thing".
LOCATION = {"uri": "path", "querystring": "query"}


def document(url, **known):
    """OpenAPI 3.1 of all operations. `known`: by name of a path label, values that exist; examples use them as well."""
    model = aws_model.model()
    schemas = _Schemas()
    paths = {}
    for name in model.operation_names:
        operation = model.operation_model(name)
        path = operation.http["requestUri"]
        paths.setdefault(path, {})[operation.http["method"].lower()] = _operation(operation, schemas, known)
    return {
        "openapi": "3.1.0", "info": {"title": model.metadata["serviceFullName"], "version": model.metadata["apiVersion"]},
        "servers": [{"url": url}], "paths": paths, "components": {"schemas": schemas.made},
    }


def _operation(operation, schemas, known):
    shape = operation.input_shape
    parameters, body, required = [], {}, []
    for name, member in shape.members.items():
        where = LOCATION.get(member.serialization.get("location"))
        if where is None:
            body[name] = schemas.of(member)
            required += [name] if name in shape.required_members else []
            continue
        label = member.serialization["name"]
        schema = schemas.of(member)
        if where == "path":
            # An empty label is another path.
            schema = {"anyOf": [{"enum": known[label]}, schema]} if known.get(label) else schema
        parameters.append({"name": label, "in": where, "required": where == "path" or name in shape.required_members, "schema": schema})
    answers = {str(operation.http.get("responseCode", 200)): {"description": "done"}}
    if operation.output_shape is not None and answers.get("204") is None:
        answers[str(operation.http.get("responseCode", 200))]["content"] = {"application/json": {"schema": {"type": "object"}}}
    for status in {error.metadata["error"]["httpStatusCode"] for error in operation.error_shapes} | set(aws_model.FRAMEWORK.values()):
        answers[str(status)] = {"description": "refused", "content": {"application/json": {"schema": {"type": "object"}}}}
    made = {"operationId": operation.name, "parameters": parameters, "responses": answers}
    if body:
        schema = {"type": "object", "properties": body, "required": required}
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return made


class _Schemas:
    """The shapes that were asked for, each once."""

    def __init__(self):
        self.made = {}

    def of(self, shape):
        if shape.name not in self.made:
            self.made[shape.name] = {}
            self.made[shape.name].update(self._make(shape))
        return {"$ref": f"#/components/schemas/{shape.name}"}

    def _make(self, shape):
        limits = shape.metadata
        kind = shape.type_name
        if kind == "structure":
            members = {name: self.of(member) for name, member in shape.members.items()}
            made = {"type": "object", "properties": members, "required": list(shape.required_members)}
            return made | ({"minProperties": 1, "maxProperties": 1, "additionalProperties": False} if limits.get("union") else {})
        if kind == "list":
            return {"type": "array", "items": self.of(shape.member)} | _limits(limits, "minItems", "maxItems")
        if kind == "map":
            return {"type": "object", "additionalProperties": self.of(shape.value)} | _limits(limits, "minProperties", "maxProperties")
        if kind == "string":
            made = {"type": "string"} | _limits(limits, "minLength", "maxLength")
            if shape.enum:
                return {"type": "string", "enum": list(shape.enum)}
            # JSON Schema's patterns match anywhere, AWS's the whole; \p is of neither Python nor JSON Schema.
            if limits.get("pattern") and r"\p" not in limits["pattern"]:
                made["pattern"] = f"^({limits['pattern']})$"
            return made
        if kind in ("integer", "long"):
            return {"type": "integer"} | _limits(limits, "minimum", "maximum")
        return {"type": {"boolean": "boolean", "timestamp": "number"}[kind]}


def _limits(limits, least, most):
    return {name: limits[key] for key, name in (("min", least), ("max", most)) if key in limits}
