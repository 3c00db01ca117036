"""JSON schemas to EBNF: the text of a grammar whose texts are JSON that fits the schema.

Understood are `type` (one or several), `properties`, `required`, `additionalProperties` (for objects
without `properties`), `items`, `minItems`, `maxItems`, `minLength`, `maxLength`, `enum`, `const`,
`anyOf`, `oneOf` and `$ref` to `$defs`. What the grammar makes always fits; not all that fits is made:
properties come in the schema's order, each at most once and no others, and the strings of `enum`,
`const` and property names have one spelling.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from common.errors import UserError

_CHARACTER = r'([^"\\\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9A-Fa-f]{4}))'
_TERMINALS = {
  "string": rf'"\"" {_CHARACTER}* "\""',
  "integer": '"-"? ("0" | [1-9] [0-9]*)',
  "number": '"-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)?',
  "boolean": '"true" | "false"',
  "null": '"null"',
}
_TYPES = {*_TERMINALS, "object", "array"}
# What restricts nothing here.
_IGNORED = {
  *("$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default"),
  *("examples", "deprecated", "readOnly", "writeOnly", "additionalProperties"),
}
_UNDERSTOOD = {
  *("type", "properties", "required", "items", "minItems", "maxItems", "minLength", "maxLength"),
  *("enum", "const", "anyOf", "oneOf", "$ref"),
}

Schema = Mapping[str, Any] | bool


def json_schema_ebnf(schema: Schema = True, *, whitespace: str = r"[ \t\n\r]*") -> str:
  """EBNF of the JSON texts that fit a schema; by default of any JSON value.

  Args:
    schema: parsed JSON.
    whitespace: an EBNF expression, what may stand around the punctuation. A model may go on for
      ever with the default; `" "?` is enough for a text on one line.

  Raises:
    UserError: a keyword or a type that is not understood, or a reference to nothing.
  """
  return "\n".join(f"{name} ::= {body}" for name, body in _Rules(schema, whitespace).read()) + "\n"


class _Rules:
  """The rules of a schema. Subschemas wait in a list, so that nesting may be deep."""

  def __init__(self, schema: Schema, whitespace: str):
    self.schema = schema
    self.whitespace = whitespace
    self.pending: list[tuple[str, Schema]] = [("value", schema)]
    self.references = {"#": "value"}
    self.count = 0

  def read(self) -> Iterator[tuple[str, str]]:
    yield "root", "space value space"
    yield "space", self.whitespace
    yield from _TERMINALS.items()
    yield "any", "any-object | any-array | " + " | ".join(_TERMINALS)
    yield from self._object("any-object", {}, "any")
    yield "any-array", self._array({}, "any")
    while self.pending:
      name, schema = self.pending.pop()
      yield from self._schema(name, schema)

  def _rule(self, schema: Schema) -> str:
    """The name of a rule for a subschema, which is read later."""
    if schema is True or schema == {}:
      return "any"
    self.count += 1
    name = f"value-{self.count}"
    self.pending.append((name, schema))
    return name

  def _schema(self, name: str, schema: Schema) -> Iterator[tuple[str, str]]:
    if schema is True:
      schema = {}
    if not isinstance(schema, Mapping):
      raise UserError(
        f"JSON schema: {schema!r} is no schema that something fits: expected an object"
      )
    if unknown := schema.keys() - _IGNORED - _UNDERSTOOD:
      raise UserError(
        f"JSON schema: {', '.join(sorted(unknown))} is not understood; expected "
        + ", ".join(sorted(_UNDERSTOOD))
      )
    if "$ref" in schema:
      yield name, self._reference(schema["$ref"])
    elif "const" in schema:
      yield name, _literal(schema["const"])
    elif "enum" in schema:
      if not schema["enum"]:
        raise UserError("JSON schema: an empty enum allows no value: expected at least one")
      yield name, " | ".join(map(_literal, schema["enum"]))
    elif choices := schema.get("anyOf", schema.get("oneOf")):
      yield name, " | ".join(map(self._rule, choices))
    else:
      types = schema.get("type", "object" if "properties" in schema else None)
      if types is None:
        yield name, "any"
        return
      types = [types] if isinstance(types, str) else types
      if not types or not set(types) <= _TYPES:
        raise UserError(
          f"JSON schema: type {types} is unknown; expected {', '.join(sorted(_TYPES))}"
        )
      names = {kind: f"{name}-{kind}" for kind in types}
      yield name, " | ".join(names.values())
      for kind, rule in names.items():
        yield from self._typed(rule, kind, schema)

  def _typed(self, name: str, kind: str, schema: Mapping) -> Iterator[tuple[str, str]]:
    if kind == "object":
      more = schema.get("additionalProperties", True)
      yield from self._object(name, schema, "" if more is False else self._rule(more))
    elif kind == "array":
      yield name, self._array(schema, self._rule(schema.get("items", True)))
    elif kind == "string" and {"minLength", "maxLength"} & schema.keys():
      bounds = f"{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
      yield name, rf'"\"" {_CHARACTER}{bounds} "\""'
    else:
      yield name, kind

  def _reference(self, reference: str) -> str:
    """The rule of `#/$defs/NAME` (or any other path into the schema)."""
    if reference not in self.references:
      target = self.schema
      path = reference.removeprefix("#/").split("/")
      for key in (part.replace("~1", "/").replace("~0", "~") for part in path):
        if not reference.startswith("#/") or not isinstance(target, Mapping) or key not in target:
          raise UserError(
            f"JSON schema: the reference {reference!r} leads nowhere: expected #/$defs/NAME"
          )
        target = target[key]
      self.references[reference] = self._rule(target)
    return self.references[reference]

  def _array(self, schema: Mapping, item: str) -> str:
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    if high is not None and high < low:
      raise UserError(f"JSON schema: {low} to {high} items: expected minItems <= maxItems")
    if high == 0:
      return '"[" space "]"'
    most = "" if high is None else high - 1
    items = f'{item} space ("," space {item} space){{{max(low - 1, 0)},{most}}}'
    return f'"[" space {items} "]"' if low else f'"[" space ({items})? "]"'

  def _object(self, name: str, schema: Mapping, more: str) -> Iterator[tuple[str, str]]:
    """Rules of an object. `more`: the rule of the values of an object whose keys are free.

    Rule FIRST-i goes on from property i with none before it, REST-i with some.
    """
    properties, required = schema.get("properties"), schema.get("required", [])
    if not properties:
      if required:
        raise UserError(f"JSON schema: required {required} is not among the properties: add them")
      member = f'string space ":" space {more} space'
      yield name, f'"{{" space ({member} ("," space {member})*)? "}}"' if more else '"{" space "}"'
      return
    if missing := set(required) - properties.keys():
      raise UserError(
        f"JSON schema: required {sorted(missing)} is not among the properties: add it"
      )
    yield name, f'"{{" space {name}-first-0 "}}"'
    for i, (key, subschema) in enumerate(properties.items()):
      yield f"{name}-{i}", f'{_literal(key)} space ":" space {self._rule(subschema)} space'
      first, rest = f"{name}-{i} {name}-rest-{i + 1}", f'"," space {name}-{i} {name}-rest-{i + 1}'
      if key not in required:
        first, rest = f"{first} | {name}-first-{i + 1}", f"{rest} | {name}-rest-{i + 1}"
      yield f"{name}-first-{i}", first
      yield f"{name}-rest-{i}", rest
    yield f"{name}-first-{len(properties)}", '""'
    yield f"{name}-rest-{len(properties)}", '""'


def _literal(value: Any) -> str:
  """A JSON value as an EBNF literal."""
  text = json.dumps(value, ensure_ascii=False)
  return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
