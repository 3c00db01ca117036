"""Tasks: a prompt, a grammar of what may follow, and what tells whether a text is right."""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Mapping

from common.errors import UserError
from projects.gad.sygus import evaluate


@dataclasses.dataclass(frozen=True)
class Task:
  """What to write, and how it is judged.

  Attributes:
    name: unique.
    prompt: text before it.
    grammar: EBNF of what may follow (`common.decoding.grammar.ebnf`).
    answers: texts that are right, if that can be listed.
    examples: of a SyGuS program, {"arguments": {name: value}, "output": value} each.
  """

  name: str
  prompt: str
  grammar: str
  answers: frozenset[str] = frozenset()
  examples: tuple[Mapping, ...] = ()

  def is_correct(self, text: str) -> bool | None:
    """Whether a text is right; None if nothing says what is."""
    if self.answers:
      return text in self.answers
    if not self.examples:
      return None
    try:
      values = [evaluate(text, example["arguments"]) for example in self.examples]
    except ValueError:
      return False
    return all(value == example["output"] for value, example in zip(values, self.examples))


# Lines of Python that begin at the margin, so that a line's end is one token. None has more than 23
# characters, so that with 24 tokens no sample is cut off.
EMBEDDED = (
  Task(
    "import",
    "import os\nimport re\nimport sys\n",
    r'root ::= "import " [a-z_]{1,10}',
    frozenset(f"import {name}" for name in sys.stdlib_module_names),
  ),
  Task(
    "constant",
    "WIDTH = 80\nHEIGHT = 24\nDEBUG = False\n",
    'root ::= [A-Z]{1,6} " = " value\nvalue ::= "0" | [1-9] [0-9]{0,2} | "True" | "False" | "None"',
  ),
  Task(
    "arithmetic",
    "x = 1 + 2\ny = x * 3\n",
    'root ::= "z = " factor (" " [-+*] " " factor)?\n'
    'factor ::= name | number | "(" name " " [-+*] " " name ")"\n'
    "name ::= [xyz]\nnumber ::= [1-9] [0-9]?",
  ),
  Task(
    "list",
    'names = ["a", "b"]\nsizes = [1, 2, 3]\n',
    'root ::= "flags = [" (item (", " item)?)? "]"\n'
    r'item ::= "True" | "False" | "None" | [0-9]{1,2} | "\"" [a-z]{1,2} "\""',
  ),
  Task(
    "assert",
    "assert x == 1\nassert len(y) > 0\n",
    'root ::= "assert " test\n'
    'test ::= name | name " " ("==" | "!=" | "<" | ">" | "is" | "in") " " (name | number | "None")\n'
    'name ::= [xyz] | "len(" [xyz] ")"\nnumber ::= "0" | [1-9] [0-9]?',
  ),
  Task(
    "bits",
    "MASK = 0b10100\nFLAG = 0b00011\n",
    'root ::= "BITS = 0b" ("00000" | "1" [01]{4})',
  ),
)


def load_tasks(path: str) -> tuple[Task, ...]:
  """The tasks of a file of JSON lines, or the embedded ones if there is none.

  Raises:
    UserError: the file cannot be read, or a line is no task.
  """
  if not path:
    return EMBEDDED
  try:
    lines = pathlib.Path(path).expanduser().read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(
      f"cannot read the tasks {path}: {e}; set --config.tasks to a JSONL file"
    ) from None
  tasks = [_read_task(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
  if not tasks or len({task.name for task in tasks}) < len(tasks):
    raise UserError(f"{path}: expected at least one task, and names that differ")
  return tuple(tasks)


def _read_task(path: str, number: int, line: str) -> Task:
  where = f"{path}, line {number}"
  try:
    fields = json.loads(line)
  except (json.JSONDecodeError, RecursionError) as e:
    raise UserError(f"{where}: not JSON: {e}") from None
  if not isinstance(fields, dict):
    raise UserError(f"{where}: expected an object")
  for name in ("name", "prompt", "grammar"):
    if not isinstance(fields.get(name), str) or not fields[name]:
      raise UserError(f"{where}: {name} is missing: expected a text")
  if not re.fullmatch(r"[\w.-]+", fields["name"]):
    raise UserError(f"{where}: the name {fields['name']!r} names files too: letters, digits, _ . -")
  examples = fields.get("examples", [])
  if not all(isinstance(e, dict) and {"arguments", "output"} <= e.keys() for e in examples):
    raise UserError(f'{where}: expected examples {{"arguments": {{...}}, "output": ...}}')
  return Task(
    fields["name"],
    fields["prompt"],
    fields["grammar"],
    frozenset(fields.get("answers", ())),
    tuple(examples),
  )
