"""In-Context Navigation: probing a language model for many different answers.

The next token's distribution is softmax(W q): q is the last hidden state (the *query*), the rows of
W are the vocabulary's *keys*. A key that resembles that of a likely token is ranked high with it,
right or wrong. ICN moves the query away from what is explored: it shows the explored answers in the
prompt and asks for the next one.

`Prober` reads prompts and completes first tokens; `navigate` is the loop.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from common.decoding.cache import take_rows
from common.decoding.generation import (
  Progress,
  Sampled,
  Sampling,
  advance,
  prepare,
  start,
  until_stop,
)
from common.errors import UserError
from common.evaluation.log_likelihood import whole_batches
from common.models.decoder import Decoder

Array = jax.Array
PromptBuilder = Callable[[int, Sequence[str]], str]

QUOTE = '"'


class Navigation(NamedTuple):
  """How first tokens are chosen and completed.

  Attributes:
    rounds, per_round: n_run and n_tol, rounds and first tokens taken in each.
    context: what the ranking prompt shows as explored: "explored" answers (ICN), "none" (the plain
      ranking), or the answers explored for the "next" question, which are wrong (a control).
    regularized: complete from the initial prompt; else from the one that ranked the token.
    key_penalty: lambda of `subtract_explored_keys`, 0 for none.
  """

  rounds: int
  per_round: int
  context: Literal["explored", "none", "next"] = "explored"
  regularized: bool = True
  key_penalty: float = 0.0


class Probed(NamedTuple):
  """What navigation found for one question, in the order in which it was completed.

  Attributes:
    first_tokens: int32 [items].
    answers: their completed texts, [items].
    queries: float32 [rounds, width], the query that ranked the first tokens of each round.
  """

  first_tokens: np.ndarray
  answers: list[str]
  queries: np.ndarray


def list_prompt(instruction: str, explored: Sequence[str]) -> str:
  """Instruction, explored answers as a numbered list of quotations, and the next one's opening."""
  items = "".join(f'{i}. "{answer}"\n' for i, answer in enumerate(explored, 1))
  return f'{instruction}\nAnswer:\n{items}{len(explored) + 1}. "'


@functools.partial(jax.jit, static_argnums=0)
def read_queries(graphdef, state, tokens: Array, segment_ids: Array) -> tuple[Array, Array]:
  """Queries float32 [batch, width] and logits float32 [batch, vocab] behind prompts.

  Args:
    tokens, segment_ids: int32 [batch, seq], padded on the left.
  """
  model = nnx.merge(graphdef, state)
  positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
  x, _ = model.run_blocks(tokens, positions, segment_ids)
  query = model.head_input(x[:, -1:])
  return query[:, 0].astype(jnp.float32), model.logits(query)[:, 0]


@functools.partial(jax.jit, static_argnums=3)
def next_tokens(logits: Array, probed: Array, groups: Array, count: int) -> Array:
  """The best-ranked first tokens that are not probed yet, int32 [batch, count].

  Args:
    logits: float32 [batch, vocab].
    probed: bool [batch, vocab], by group.
    groups: int32 [vocab], in [0, vocab): tokens of a group are one answer's beginning, with and
      without a space say, of which the best-ranked stands for all (equal ones: the first).
    count: tokens to take, at most as many as there are groups that are not probed.
  """
  vocab = logits.shape[-1]

  def winners(logits):
    best = jax.ops.segment_max(logits, groups, vocab)
    tied = jnp.where(logits == best[groups], jnp.arange(vocab), vocab)
    return jax.ops.segment_min(tied, groups, vocab)[groups] == jnp.arange(vocab)

  taken = jax.vmap(winners)(logits) & ~probed[:, groups]
  return jax.lax.top_k(jnp.where(taken, logits, -jnp.inf), count)[1]


@jax.jit
def subtract_explored_keys(
  logits: Array, queries: Array, probed: Array, kernel: Array, strength: Array
) -> Array:
  """Logits of the query q - strength ||q|| m / ||m||, m the mean key of the probed tokens.

  An ablation: it moves the query away from explored keys without a prompt that shows the answers.

  Args:
    logits: float32 [batch, vocab] of the queries, float32 [batch, width].
    probed: bool [batch, vocab]; a row without any is left as it is.
    kernel: [width, vocab], the keys.
    strength: float32 [].
  """
  mean = probed.astype(jnp.float32) @ kernel.T.astype(jnp.float32)
  direction = mean / jnp.maximum(jnp.linalg.norm(mean, axis=1, keepdims=True), 1e-12)
  moved = strength * jnp.linalg.norm(queries, axis=1, keepdims=True) * direction
  return logits - moved @ kernel.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 7))
def complete_branches(
  graphdef, state, tokens: Array, segment_ids: Array, rows: Array, first: Array, stop: Array, count
) -> Array:
  """Greedy continuations of prompts that each begin with a given token, int32 [branches, count].

  A prompt is read once; its branches go on from copies of its cache.

  Args:
    tokens, segment_ids: int32 [prompts, seq], padded on the left.
    rows: int32 [branches], the prompt of each branch.
    first: int32 [branches], its first token, which is the first column of the result.
    stop: int32 [stops], tokens that end a branch; what stands behind one is not meant.
    count: tokens of a branch, `first` among them.
  """
  _, progress = start(nnx.merge(graphdef, state), tokens, segment_ids, count)
  branches = Progress(take_rows(progress.cache, rows), progress.positions[rows])
  new = jnp.full((len(rows), count), stop[0], jnp.int32).at[:, 0].set(first)
  sampled = Sampled(branches, jax.random.key(0), first)  # Greedy: the key is not used.
  return advance(graphdef, state, sampled, new, 1, count, stop, Sampling())[1]


class Prober:
  """Reads prompts and completes first tokens; a completion is computed once.

  Attributes:
    model, tokenizer: as given.
    stop: int32 [stops], the tokens that end an answer.
    completed, hits: completions computed, and taken from earlier ones.
  """

  def __init__(
    self,
    model: Decoder,
    tokenizer: tokenizers.Tokenizer,
    *,
    max_new_tokens: int,
    ends: str = QUOTE,
    prompt_batch: int = 64,
    branch_batch: int = 256,
    prompt_lengths: Sequence[int] = (),
  ):
    """Wraps a model.

    Args:
      model: with a float32 or bfloat16 head.
      tokenizer: its tokenizer.
      max_new_tokens: of an answer, the first one among them.
      ends: a text that ends an answer; a token that contains it stops a completion.
      prompt_batch, branch_batch: prompts read and branches completed at once.
      prompt_lengths: what prompts are padded to, the next one that fits, so that a growing list of
        explored answers compiles no more often than that. Longer ones to multiples of 32.

    Raises:
      UserError: the tokenizer has more tokens than the model, or none that ends an answer.
    """
    vocab = model.config.vocab_size
    if tokenizer.get_vocab_size() > vocab:
      raise UserError(
        f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {vocab}: expected the "
        "model's own tokenizer"
      )
    stop = [i for i in range(tokenizer.get_vocab_size()) if ends in tokenizer.decode([i])]
    if not stop:
      raise UserError(f"no token of the tokenizer contains {ends!r}: answers would not end")
    self._graphdef, self._state = nnx.split(model)
    self.model, self.tokenizer, self.stop = model, tokenizer, np.array(stop, np.int32)
    self.max_new_tokens = max_new_tokens
    self.completed = self.hits = 0
    self._ends, self._prompt_batch, self._branch_batch = ends, prompt_batch, branch_batch
    self._prompt_lengths = sorted(prompt_lengths)
    self._texts: dict[tuple[str, int], str] = {}

  def read(self, prompts: Sequence[str]) -> tuple[Array, Array]:
    """Queries float32 [prompts, width] and logits float32 [prompts, vocab]."""
    batches = whole_batches(self.encode(prompts), min(self._prompt_batch, len(prompts)))
    found = [read_queries(self._graphdef, self._state, *self.padded(b)) for b in batches]
    return jax.tree.map(lambda *x: jnp.concatenate(x)[: len(prompts)], *found)

  def complete(self, prompts: Sequence[str], first_tokens: np.ndarray) -> list[list[str]]:
    """Answers that begin with given tokens, [prompts][n]: the text before the one that ends them.

    Args:
      prompts: what stands before.
      first_tokens: int [prompts, n].
    """
    wanted = [(p, int(t)) for p, row in zip(prompts, first_tokens) for t in row]
    missing = [pair for pair in dict.fromkeys(wanted) if pair not in self._texts]
    self.completed += len(missing)
    self.hits += len(wanted) - len(missing)
    # As many prompts at once whichever of them are missing: one compilation.
    size = min(self._prompt_batch, len(set(prompts)))
    for chunk in whole_batches(list(dict.fromkeys(p for p, _ in missing)), size):
      row = {prompt: i for i, prompt in enumerate(chunk)}
      padded = self.padded(self.encode(chunk))
      pairs = [pair for pair in missing if pair[0] in row]
      for batch in whole_batches(pairs, self._branch_batch):
        rows, first = (np.array(x, np.int32) for x in zip(*[(row[p], t) for p, t in batch]))
        new = complete_branches(
          self._graphdef, self._state, *padded, rows, first, self.stop, self.max_new_tokens
        )
        for pair, tokens in zip(batch, np.asarray(new).tolist()):
          self._texts[pair] = self.text(tokens)
    return [[self._texts[p, int(t)] for t in row] for p, row in zip(prompts, first_tokens)]

  def encode(self, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids, with the special tokens of the tokenizer's template."""
    return [encoding.ids for encoding in self.tokenizer.encode_batch(list(prompts))]

  def text(self, tokens: Sequence[int]) -> str:
    """The answer in new tokens: the text before the first `ends`, stripped."""
    # The token that ends it is decoded too: its beginning may belong to the answer.
    kept = until_stop(tokens, self.stop)
    return self.tokenizer.decode(tokens[: len(kept) + 1]).partition(self._ends)[0].strip()

  def padded(self, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids, int32 [prompts, seq]; see `prompt_lengths`."""
    tokens, segment_ids, _ = prepare(self.model, prompts, self.max_new_tokens, None)
    length = tokens.shape[1]
    more = next((n for n in self._prompt_lengths if n >= length), length) - length
    return tuple(np.pad(x, ((0, 0), (more, 0))) for x in (tokens, segment_ids))


def navigate(
  prober: Prober,
  prompt: PromptBuilder,
  questions: int,
  how: Navigation,
  groups: np.ndarray,
) -> list[Probed]:
  """Probes all questions, a round at a time.

  A round ranks the first tokens behind the prompt that shows what rounds before have explored,
  takes the best that were not probed yet, and completes each of them greedily. The prompt of the
  next round is text, so that the host waits for each round.

  Args:
    prober: of the model.
    prompt: `prompt(i, explored)` is question i's prompt that shows `explored` answers.
    questions: how many.
    how: rounds and variants.
    groups: see `next_tokens`.

  Raises:
    UserError: more items are asked for than there are groups.
  """
  items, vocab = how.rounds * how.per_round, prober.model.config.vocab_size
  if items > (available := len(set(groups.tolist()))):
    raise UserError(
      f"{how.rounds} rounds of {how.per_round} first tokens: the vocabulary has {available} that "
      "differ; expected fewer"
    )
  initial = [prompt(i, []) for i in range(questions)]
  explored: list[list[str]] = [[] for _ in initial]
  probed, tokens, queries = jnp.zeros((questions, vocab), bool), [], []
  kernel = prober.model.head_kernel if how.key_penalty else None
  for _ in range(how.rounds):
    shown = {"explored": explored, "next": explored[1:] + explored[:1]}.get(how.context)
    prompts = [prompt(i, shown[i]) for i in range(questions)] if shown else initial
    query, logits = prober.read(prompts)
    if how.key_penalty:
      seen = probed[:, groups]
      logits = subtract_explored_keys(logits, query, seen, kernel, how.key_penalty)
    taken = next_tokens(logits, probed, groups, how.per_round)
    probed = probed.at[jnp.arange(questions)[:, None], groups[taken]].set(True)
    tokens.append(np.asarray(taken))
    queries.append(np.asarray(query))
    completed = prober.complete(initial if how.regularized else prompts, tokens[-1])
    explored = [[*old, *new] for old, new in zip(explored, completed)]
  by_question = zip(np.concatenate(tokens, axis=1), explored, np.stack(queries, axis=1))
  return [Probed(*found) for found in by_question]


def token_groups(tokenizer: tokenizers.Tokenizer, vocab: int, *, merge_spaces: bool) -> np.ndarray:
  """Which tokens are the same beginning of an answer, int32 [vocab]: the first such token's id.

  Args:
    tokenizer: of the model.
    vocab: rows of the head, which may be more than the tokenizer's tokens.
    merge_spaces: tokens that differ in white space around them only are one; else each is its own.
  """
  if not merge_spaces:
    return np.arange(vocab, dtype=np.int32)
  first: dict[str | int, int] = {}
  texts = [tokenizer.decode([i]).strip() or i for i in range(vocab)]
  return np.array([first.setdefault(text, i) for i, text in enumerate(texts)], np.int32)
