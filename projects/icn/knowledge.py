"""What is asked: instructions with their gold answers, and lists to train a small model on.

synthetic   questions with answers spread over families of names: a letter, a syllable, a word or a
            digit, and a last character. Every question has its own shares of the families.
modules     public names of modules of the standard library, by `dir`
lines       short lines of the embedded corpora (open-ended: nothing is right or wrong)

A model is trained on enumerated lists of them in random order without repeats.
"""

import importlib
import itertools
import string
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from common.data.sources import load_documents
from common.data.tokenizer import SPECIAL_TOKENS
from common.errors import UserError
from projects.icn.icn import list_prompt

_TOPICS = [
  beginning + end
  for beginning in "bar cal dor fen gil hos jun kep lam mor nev pal".split()
  for end in "as eks ils ons urs iths ebs ods".split()
]


class Question(NamedTuple):
  """An instruction, with what is a right answer to it.

  Attributes:
    instruction: such as "Please show me some baras."
    answers: right ones, [answers]; empty where none is known.
    weights: how often each is listed, [answers], beside 1 for the commonest.
  """

  instruction: str
  answers: tuple[str, ...]
  weights: tuple[float, ...] = ()


def families() -> dict[str, list[str]]:
  """Stems of names by kind; every one is a token to `train_tokenizer`."""
  syllables = ["".join(pair) for pair in itertools.product("bdfklmnprstv", "aeiou")]
  return {
    "capital": list(string.ascii_uppercase),
    "letter": list(string.ascii_lowercase),
    "digit": list(string.digits),
    "syllable": syllables[::2],
    "word": [stem + end for stem, end in itertools.product(syllables[1::4], ("rin", "lom"))],
  }


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
  """A byte-level BPE in which `. "` and `"` with the line's end, around an item, are tokens.

  Args:
    texts: lists, as `training_lists` makes them.
    vocab_size: tokens at most; 256 bytes and the special tokens among them.
  """
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  split, byte_level = tokenizers.pre_tokenizers.Split, tokenizers.pre_tokenizers.ByteLevel
  around = tokenizers.Regex(r"\. \"|\"\n")
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      split(around, "isolated"),
      split(tokenizers.Regex(r" ?[A-Za-z]+|[0-9]+"), "isolated"),
      byte_level(add_prefix_space=False, use_regex=False),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=list(SPECIAL_TOKENS),
    initial_alphabet=byte_level.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  tokenizer.encode_special_tokens = True
  return tokenizer


def synthetic_questions(*, count: int, answers: int, seed: int) -> tuple[list[Question], list[str]]:
  """Questions of one synthetic world.

  A stem has two names, of which a question takes at most one. A question's shares of the families
  are drawn from a Dirichlet distribution; how common an answer is (a falling weight,
  exp(-rank / 16)) does not depend on its family.

  Returns:
    The questions, and all names of the world.

  Raises:
    UserError: more questions than there are descriptions, or more answers than stems.
  """
  rng = np.random.default_rng(seed)
  stems = families()
  if answers > sum(map(len, stems.values())):
    raise UserError(
      f"answers={answers}: expected at most {sum(map(len, stems.values()))}, the stems of names"
    )
  if count > len(_TOPICS):
    raise UserError(f"questions={count}: expected at most {len(_TOPICS)}")
  last = lambda kind: string.ascii_lowercase if kind == "digit" else string.digits
  names = {
    (kind, stem): [stem + c for c in rng.choice(list(last(kind)), 2, replace=False)]
    for kind, of_kind in stems.items()
    for stem in of_kind
  }
  flat = list(names)
  questions = []
  for index in rng.permutation(len(_TOPICS))[:count]:
    shares = dict(zip(stems, rng.dirichlet(np.full(len(stems), 0.7))))
    weights = np.array([shares[kind] / len(stems[kind]) for kind, _ in flat]) + 1e-4
    chosen = rng.choice(len(flat), answers, replace=False, p=weights / weights.sum())
    found = tuple(names[flat[i]][rng.integers(2)] for i in chosen)
    popularity = tuple(np.exp(-np.arange(answers) / 16).tolist())
    questions.append(Question(f"Please show me some {_TOPICS[index]}.", found, popularity))
  return questions, [name for pair in names.values() for name in pair]


def module_questions(modules: Sequence[str]) -> list[Question]:
  """Public names of modules of the standard library."""
  questions = []
  for name in modules:
    try:
      module = importlib.import_module(name)
    except ImportError:
      raise UserError(f"modules: there is no module {name!r}; expected importable ones") from None
    members = tuple(m for m in dir(module) if not m.startswith("_"))
    questions.append(
      Question(f"Please show me some members of module {name}.", members, (1.0,) * len(members))
    )
  return questions


def corpus_lines(domains: Sequence[str], split: str, count: int) -> dict[str, list[str]]:
  """Short lines without quotation marks of each embedded domain, evenly spaced over the split."""
  lines = {}
  for domain in domains:
    texts = (d["text"] for d in load_documents(f"embedded:{domain}", split))
    stripped = (line.strip() for text in texts for line in text.split("\n"))
    kept = [s for s in dict.fromkeys(stripped) if 12 <= len(s) <= 40 and '"' not in s]
    lines[domain] = [kept[i] for i in np.linspace(0, len(kept) - 1, count).astype(int)]
  return lines


def line_instruction(domain: str) -> str:
  """Asks for lines of a domain."""
  return f"Please show me some lines of {domain}."


def training_lists(
  questions: Sequence[Question],
  names: Sequence[str],
  *,
  count: int,
  longest: int,
  mistakes: float,
  zipf_exponent: float = 0.0,
  seed: int,
) -> list[str]:
  """Enumerated lists in random order without repeats, of 1 to `longest` items.

  An item is drawn from what is not listed yet, a right answer by its weight; all other `names`
  together weigh `mistakes` times what the answers weigh at first. So some items are wrong, and a
  list that has all answers goes on with wrong ones. Question i, from 1, is drawn in proportion to
  i ** -zipf_exponent.
  """
  rng = np.random.default_rng(seed)
  share = np.arange(1.0, len(questions) + 1) ** -zipf_exponent
  texts = []
  for index in rng.choice(len(questions), count, p=share / share.sum()):
    question = questions[index]
    right = set(question.answers)
    others = [name for name in names if name not in right]
    items = [*question.answers, *others]
    weights = np.array([*question.weights, *[1.0] * len(others)])
    weights[len(right) :] *= mistakes * sum(question.weights) / max(len(others), 1)
    # The smallest exponential draws / weight are a draw without replacement.
    order = np.argsort(rng.exponential(size=len(items)) / np.maximum(weights, 1e-12))
    listed = [items[j] for j in order[: rng.integers(1, longest + 1)]]
    texts.append(list_prompt(question.instruction, listed)[: -len(f'{len(listed) + 1}. "')])
  return texts
