import json

import pytest

from common.decoding.grammar.ebnf import parse_ebnf
from common.decoding.grammar.json_schema import json_schema_ebnf
from common.decoding.grammar.recognizer import Recognizer
from common.errors import UserError

PERSON = {
  "type": "object",
  "properties": {
    "name": {"type": "string", "minLength": 1, "maxLength": 3},
    "age": {"type": ["integer", "null"]},
    "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
    "colour": {"$ref": "#/$defs/colour"},
  },
  "required": ["age"],
  "additionalProperties": False,
  "$defs": {"colour": {"enum": ["red", 'a "quote" \\', 1, None]}},
}


def fits(schema, text: str, **options) -> bool:
  recognizer = Recognizer(parse_ebnf(json_schema_ebnf(schema, **options)))
  state = recognizer.read(recognizer.start, text.encode())
  return state is not None and recognizer.accepts(state)


@pytest.mark.parametrize(
  "value",
  [
    0,
    -2.5e-10,
    1e300,
    "",
    'é\n"\\\x00語😀',
    [],
    {},
    [1, {"a": [None, True]}],
    {"x": {"": [False]}},
  ],
)
@pytest.mark.parametrize("options", [{}, {"indent": 2}, {"ensure_ascii": False}])
def test_any_json_value(value, options):
  assert fits(True, json.dumps(value, **options))


@pytest.mark.parametrize(
  "text",
  ["", "[1,]", "{a: 1}", "01", "+1", ".5", '"\n"', "tru", '{"a": 1,}', "[1 2]", '"\\x"', "1 2"],
)
def test_what_is_no_json(text):
  assert not fits(True, text)


@pytest.mark.parametrize(
  "value, expected",
  [
    ({"age": 1}, True),
    ({"name": "abc", "age": None}, True),
    ({"age": 2, "children": [{"age": 3}, {"name": "é", "age": 1}], "colour": "red"}, True),
    ({"age": 1, "colour": 'a "quote" \\'}, True),
    ({}, False),
    ({"name": "a"}, False),
    ({"name": "", "age": 1}, False),
    ({"name": "abcd", "age": 1}, False),
    ({"age": 1.5}, False),
    ({"age": 1, "children": [{"age": 1}] * 3}, False),
    ({"age": 1, "children": [{}]}, False),
    ({"age": 1, "colour": 2}, False),
    ({"age": 1, "more": 2}, False),
  ],
)
def test_an_object(value, expected):
  assert fits(PERSON, json.dumps(value)) == expected


@pytest.mark.parametrize(
  "schema, good, bad",
  [
    (
      {"type": "array", "items": {"type": "integer"}, "minItems": 2},
      ["[1, 2]", "[1,2,3]"],
      ["[1]"],
    ),
    ({"type": "array", "minItems": 1, "maxItems": 2}, ['["a"]', "[1,[]]"], ["[]", "[1,1,1]"]),
    ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
    ({"const": {"a": 1}}, ['{"a": 1}'], ['{"a": 2}']),
    ({"anyOf": [{"type": "boolean"}, {"const": "é"}]}, ["true", '"é"'], ["null"]),
    ({"type": "object", "additionalProperties": {"type": "null"}}, ['{"a": null}'], ['{"a": 1}']),
    ({"type": "object", "additionalProperties": False}, ["{ }"], ['{"a": 1}']),
    ({"type": "object", "properties": {"a": {}}}, ["{}", '{"a": [1]}'], ['{"b": 1}']),
    ({"title": "anything"}, ["[]", '"x"'], ["x"]),
    ({"$ref": "#/definitions/a~1b", "definitions": {"a/b": {"type": "number"}}}, ["1.5"], ['"a"']),
  ],
)
def test_other_keywords(schema, good, bad):
  assert all(fits(schema, text) for text in good)
  assert not any(fits(schema, text) for text in bad)


def test_whitespace_and_depth():
  assert fits(PERSON, '{"age": 1}', whitespace='" "?')
  assert not fits(PERSON, '{"age":  1}', whitespace='" "?')
  schema = {"type": "null"}
  for _ in range(2000):
    schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
  assert fits(schema, "[" * 2000 + "null" + "]" * 2000)


@pytest.mark.parametrize(
  "schema, message",
  [
    ({"type": "string", "pattern": "a+"}, "pattern is not understood"),
    ({"type": "text"}, "type .* is unknown"),
    ({"$ref": "#/$defs/none"}, "leads nowhere"),
    ({"$ref": "other.json"}, "leads nowhere"),
    ({"enum": []}, "empty enum"),
    (False, "no schema"),
    ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, r"required \['b'\]"),
    ({"type": "object", "required": ["b"]}, r"required \['b'\]"),
    ({"type": "array", "minItems": 2, "maxItems": 1}, "minItems <= maxItems"),
    ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "match no text at all"),
  ],
)
def test_bad_schemas_are_user_errors(schema, message):
  with pytest.raises(UserError, match=message):
    parse_ebnf(json_schema_ebnf(schema))
