"""The case studies of sections 5 to 7: contamination, books, and auditing of unlearning."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from common.decoding.generation import generate
from common.errors import UserError
from common.models.decoder import Decoder
from projects.min_k_prob.benchmark import Benchmark, Document, cut_excerpts
from projects.min_k_prob.metrics import best_threshold
from projects.min_k_prob.min_k_prob import TokenLogProbs, min_k_prob

OUTLIER, IN_DISTRIBUTION = "formatted questions", "text of the corpus's domain"
# A chunk whose score unlearning changed by less than this factor is suspicious (section 7).
SUSPICIOUS_RATIO = 1.15
# Words of the inserted strings.
QUESTION_WORDS, IN_DISTRIBUTION_WORDS = 12, 24


def format_question(document: Document, text: str) -> str:
  """A task example: which module a passage of documentation is from."""
  return f"Question: Which module says the following?\n{text}\nAnswer: {document['name']}\n"


class Inserted(NamedTuple):
  """Strings of one kind, to be inserted into a corpus.

  Attributes:
    texts: the strings.
    occurrences: how often each is inserted, int [strings]; 0 for those that never are.
  """

  texts: list[str]
  occurrences: np.ndarray


def strings_to_insert(
  documents: Sequence[Document],
  kind: str,
  *,
  per_group: int,
  occurrences: Sequence[int],
  fits: Callable[[str], bool],
  rng: np.random.Generator,
) -> Inserted:
  """`per_group` strings for 0 and for each of `occurrences`, of those that fit.

  Raises:
    UserError: the documents have too few.
  """
  found = []
  for document in documents:
    words = QUESTION_WORDS if kind == OUTLIER else IN_DISTRIBUTION_WORDS
    for text in cut_excerpts(document["text"], words, 4):
      found.append(format_question(document, text) if kind == OUTLIER else text)
  found = [text for text in dict.fromkeys(found) if fits(text)]
  groups = (0, *occurrences)
  if len(found) < per_group * len(groups):
    raise UserError(
      f"{len(documents)} documents have {len(found)} strings of {kind}, expected "
      f"{per_group * len(groups)}: lower contamination_strings"
    )
  chosen = rng.permutation(len(found))[: per_group * len(groups)]
  return Inserted([found[i] for i in chosen], np.repeat(groups, per_group))


def contaminated_corpus(
  corpus: Sequence[Sequence[int]],
  tokens: int,
  inserted: Sequence[tuple[Sequence[Sequence[int]], np.ndarray]],
) -> list[Sequence[int]]:
  """Documents for one epoch: the corpus up to `tokens`, and every inserted string so often.

  Args:
    corpus: token ids of documents.
    tokens: of the corpus; the document that reaches it is the last.
    inserted: (token ids of strings, occurrences of each) of every kind.
  """
  sizes = np.cumsum([len(document) for document in corpus])
  documents = list(corpus[: int(np.searchsorted(sizes, tokens)) + 1])
  for rows, occurrences in inserted:
    documents += [row for row, times in zip(rows, occurrences) for _ in range(times)]
  return documents


def snippets(benchmark: Benchmark, words: int) -> Benchmark:
  """Every text cut into snippets of `words`, in their order."""
  texts, rows = [], []
  for row, text in enumerate(benchmark.texts):
    cut = cut_excerpts(text, words, len(text))
    texts += cut
    rows += [row] * len(cut)
  return Benchmark(texts, benchmark.members[rows], [benchmark.documents[row] for row in rows])


class BookContamination(NamedTuple):
  """Section 5: how much of every book a model has seen.

  Attributes:
    threshold: of the validation books' best balanced accuracy.
    books: names of the other books.
    rates: share of a book's snippets with a score of at least the threshold, [books].
    members: whether a book was in the training data, bool [books].
    rows: which snippets are of these books, bool [snippets].
  """

  threshold: float
  books: list[str]
  rates: np.ndarray
  members: np.ndarray
  rows: np.ndarray


def book_contamination(
  scores: np.ndarray, benchmark: Benchmark, rng: np.random.Generator
) -> BookContamination:
  """Sets the threshold on a random half of the books of each class, and judges the other half.

  Args:
    scores: Min-K% Prob of the snippets, [snippets].
    benchmark: snippets, whose documents are the books.
    rng: draws the halves.
  """
  names = np.array(benchmark.documents)
  validation = []
  for group in (benchmark.members, ~benchmark.members):
    books = rng.permutation(np.unique(names[group]))
    validation += list(books[: len(books) // 2])
  held = np.isin(names, validation)
  threshold = best_threshold(scores[held], benchmark.members[held])
  books = np.unique(names[~held])
  rates = np.array([(scores[names == book] >= threshold).mean() for book in books])
  members = np.array([benchmark.members[names == book].any() for book in books])
  return BookContamination(threshold, list(books), rates, members, ~held)


class Completions(NamedTuple):
  """How well a model goes on with texts.

  Attributes:
    overlap: of the continuation of the first tokens with the text's own: share of places with the
      right token, [texts].
    answered: whether the token asked for is the first one generated, bool [texts].
  """

  overlap: np.ndarray
  answered: np.ndarray


def complete(
  model: Decoder, rows: Sequence[Sequence[int]], questions: np.ndarray, config: ConfigDict
) -> Completions:
  """Story completion and question answering on texts that a model may know, greedily.

  Args:
    model: the model.
    rows: token ids of every text, its bos token included.
    questions: the place in each row of the token to ask for, int [texts], at least prompt_tokens.
    config: prompt_tokens and completion_tokens.
  """
  size, new = config.prompt_tokens, config.completion_tokens
  stories = [row[:size] for row in rows]
  asked = [row[place - size : place] for row, place in zip(rows, questions)]
  generated = generate(model, stories + asked, max_new_tokens=new)
  overlap = [
    np.mean(np.array(found) == np.array(row[size : size + new]))
    for found, row in zip(generated, rows)
  ]
  answered = [
    found[0] == row[place] for found, row, place in zip(generated[len(rows) :], rows, questions)
  ]
  return Completions(np.array(overlap), np.array(answered))


def question_places(log_probs: TokenLogProbs, config: ConfigDict) -> np.ndarray:
  """The least likely token that a prompt and a completion leave room for, int [texts].

  Places count a row's bos token: scored token i is token i + 1 of the row.
  """
  first = config.prompt_tokens - 1
  places = np.arange(log_probs.values.shape[1])
  asked = (places >= first) & (places < log_probs.num_tokens[:, None])
  return np.argmin(np.where(asked, log_probs.values, np.inf), axis=1) + 1


def suspicious(before: TokenLogProbs, after: TokenLogProbs, k: float) -> np.ndarray:
  """Chunks that unlearning hardly changed, bool [texts].

  The ratio of their Min-K% Prob after and before unlearning is within a factor of 1.15.
  """
  ratio = min_k_prob(after, k) / min_k_prob(before, k)
  return (ratio < SUSPICIOUS_RATIO) & (ratio > 1 / SUSPICIOUS_RATIO)
