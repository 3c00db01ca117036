"""The engine of the server: a thread that keeps the slots of a batch busy with what is queued.

Between two steps on the device it reads new prompts, packed, into free slots and hands out tokens.
What clients do (submit, cancel) only changes the queue and flags, under a lock.
"""

import collections
import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import tokenizers
from flax import nnx

from apps.serving.jobs import TOP, Busy, Counts, End, Job, Piece, Score
from apps.serving.text import TextStream
from common.decoding import continuous
from common.decoding.bin_packing import best_fit_decreasing, one_per_bin
from common.decoding.constrained import logit_bias, padded_weights
from common.decoding.continuous import NewTexts, NewTokens, Pruning, empty_slots
from common.decoding.generation import RowSampling, Sampling
from common.decoding.prepacking import PackedPrompts, pack
from common.decoding.prompt_tokens import (
  PromptTokens,
  check_prompt_tokens,
  with_prompt_tokens,
)
from common.decoding.prompt_tree import Trees
from common.decoding.pruned_cache import Compression, check_supported
from common.decoding.speculative import Policy, constant
from common.errors import UserError
from common.models.decoder import Decoder

_CHUNK = 4  # Tokens of a row between two looks at the queue.
_WIDTHS = tuple(32 * 4**i for i in range(10))  # Of packed rows, up to the longest prompt's.


class _Row:
  """A job that waits for a slot or has one."""

  def __init__(self, job: Job, tokenizer: tokenizers.Tokenizer):
    self.job, self.count = job, 0
    self.text = TextStream(tokenizer, job.prompt, job.stop)
    self.tokens: collections.Counter[int] = collections.Counter()

  @property
  def one_by_one(self) -> bool:
    """Whether what is added to a token's logits depends on the token before it."""
    job = self.job
    return bool(job.constraint or job.presence_penalty or job.frequency_penalty)

  @property
  def biased(self) -> bool:
    """Whether anything is added to the logits."""
    return self.one_by_one or bool(self.job.bias)

  def weights(self) -> dict[int, float]:
    """What is added to the logits of some tokens, before they are divided by the temperature."""
    job = self.job
    weights = collections.defaultdict(float, job.bias)
    if job.constraint is not None:
      # The constraint's are of log-probabilities at the temperature.
      for token, weight in zip(*job.constraint.log_weights()):
        weights[token] += weight * (job.sampling.temperature or 1.0)
    if job.presence_penalty or job.frequency_penalty:
      for token, count in self.tokens.items():
        weights[token] -= job.presence_penalty + job.frequency_penalty * count
    return weights


class Engine:
  """Generates for many clients at once."""

  def __init__(
    self,
    model: Decoder,
    tokenizer: tokenizers.Tokenizer,
    *,
    slots: int,
    max_length: int,
    max_queue: int,
    stop_tokens: Sequence[int],
    prefill_tokens: int = 8192,
    draft: Decoder | None = None,
    num_drafts: int = 4,
    policy: Policy | None = None,
    compression: Compression | None = None,
    max_new_tokens: int | None = None,
    prompt_tokens: PromptTokens | None = None,
    trees: Trees | None = None,
    pack_prompts: bool = True,
  ):
    """Allocates the caches.

    Args:
      model: a decoder, quantized or not.
      tokenizer: the model's.
      slots: texts that are generated at the same time.
      max_length: tokens of a prompt and its text together, at most.
      max_queue: jobs that may wait for a slot.
      stop_tokens: each ends a text.
      prefill_tokens: slots of the packed rows that are read in one pass, unless one row has more.
      draft: makes every step a speculative one.
      num_drafts: tokens that it proposes at most.
      policy: when it stops before; what it learns of a round is not kept. By default it does not.
      compression: of the prompts' caches; None leaves them whole.
      max_new_tokens: of a text at most; with compression it says how the room of a row is divided
        (half and half by default), without it there is no limit but max_length.
      prompt_tokens, trees: make every step one of parallel-prompt decoding.
      pack_prompts: whether several share a row when they are read.

    Raises:
      UserError: a draft model with another vocabulary, prompt tokens that do not fit, parts that do
        not go together, a stop token that the model lacks, or lengths that it has no room for.
    """
    config = model.config
    if not all(0 <= token < config.vocab_size for token in stop_tokens):
      raise UserError(
        f"stop tokens {list(stop_tokens)}: the model has tokens 0 to {config.vocab_size - 1}: is "
        "generation_config.json or the tokenizer another model's?"
      )
    if draft is not None and draft.config.vocab_size != config.vocab_size:
      raise UserError(
        f"the draft model has {draft.config.vocab_size} tokens, the model {config.vocab_size}; "
        "speculative decoding needs one vocabulary"
      )
    if prompt_tokens is not None:
      if draft is not None or compression is not None:
        raise UserError(
          "prompt tokens take the place of a draft model, and move slots of the cache, which a pruned "
          "one has not: give prompt tokens alone"
        )
      check_prompt_tokens(model, prompt_tokens)
      model = with_prompt_tokens(model, prompt_tokens)
    # A step may write so much beyond the last token that is wanted.
    slack = _CHUNK if draft is None else num_drafts + 1
    if trees is not None:
      slack = trees.sources.shape[1]
    for one in (model, draft):
      if one is None or one.config.position != "learned":
        continue
      if max_length + slack > one.config.max_position_embeddings:
        raise UserError(
          f"max_length={max_length} and {slack} more need {max_length + slack} positions; the model "
          f"has {one.config.max_position_embeddings}: lower max_length"
        )
    if compression is not None:
      check_supported(config)
      max_new_tokens = max_new_tokens or max_length // 2
    self.max_length, self.vocab_size = max_length, config.vocab_size
    self.max_new_tokens = min(max_new_tokens or max_length, max_length - 1)
    self.max_prompt = max_length - (1 if compression is None else self.max_new_tokens)
    self._packer = best_fit_decreasing if pack_prompts else one_per_bin
    self._pruning = (
      None
      if compression is None
      else Pruning(compression, self.max_prompt, self.max_new_tokens + slack)
    )
    self.counts, self.slots = Counts(), slots
    self._model, self._draft = nnx.split(model), draft if draft is None else nnx.split(draft)
    self._policy = policy or constant(num_drafts)
    self._prompt_tokens, self._trees = prompt_tokens, trees
    self._num_drafts, self._max_queue = num_drafts, max_queue
    self._prefill_tokens = prefill_tokens
    # Few widths of packed rows, so that few programs are compiled.
    self._widths = [width for width in _WIDTHS if width < self.max_prompt] + [self.max_prompt]
    self._tokenizer, self._stop_tokens = tokenizer, frozenset(stop_tokens)
    self._state = empty_slots(model, slots, max_length + slack, draft, self._pruning, trees)
    self.cache_bytes = sum(
      leaf.nbytes for leaf in jax.tree.leaves((self._state.pair.target, self._state.pair.draft))
    )
    self._rows: list[_Row | None] = [None] * slots
    self._queue: collections.deque[_Row] = collections.deque()
    self._cancelled: set[Job] = set()
    self._changed = threading.Condition()
    self._closing = self._failed = False
    # A mesh is of one thread: what is traced in the engine's is for the mesh that it was made on.
    self._mesh = jax.sharding.get_mesh()
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  def warm_up(self) -> Iterator[tuple[int, int]]:
    """Compiles what requests will need, before the start; yields (programs so far, all)."""
    shapes = [
      (1 << i, width)
      for width in self._widths
      for i in range(self._rows_of_pass(width).bit_length())
    ]
    nothing, no_row = pack([[0]], [[0]]), np.zeros(self.slots, bool)
    for i, (rows, width) in enumerate(shapes):
      self._admit(nothing, rows, width, [], [])
      yield i + 1, len(shapes) + 1
    jax.block_until_ready(self._advance(no_row, None, 0, no_row))
    yield len(shapes) + 1, len(shapes) + 1

  def start(self) -> None:
    """Starts the thread."""
    self._thread.start()

  def room(self, prompt: int) -> int:
    """New tokens that a prompt of so many tokens may have; none if it is too long itself."""
    if prompt > self.max_prompt:
      return 0
    return min(self.max_length - prompt, self.max_new_tokens)

  def submit(self, *jobs: Job) -> None:
    """Queues all of the jobs or none.

    Raises:
      UserError: a prompt has no token, or one that the model lacks, or is too long.
      Busy: the queue is full, or the engine closes.
    """
    for job in jobs:
      if not len(job.prompt):
        raise UserError("the prompt has no token: expected at least one")
      if min(job.prompt) < 0 or max(job.prompt) >= self.vocab_size:
        raise UserError(f"prompt tokens must be 0 to {self.vocab_size - 1}")
      if job.max_new_tokens > self.room(len(job.prompt)):
        raise UserError(
          f"the prompt has {len(job.prompt)} tokens and {job.max_new_tokens} new ones are wanted; "
          f"here a prompt may have {self.max_prompt} tokens, a text {self.max_new_tokens}, and both "
          f"together {self.max_length}: shorten the prompt or lower max_tokens"
        )
    rows = [_Row(job, self._tokenizer) for job in jobs]
    with self._changed:
      if self._closing or self._failed:
        raise Busy("the server is shutting down")
      if len(self._queue) + len(jobs) > self._max_queue:
        raise Busy(f"{len(self._queue)} requests are waiting already; try again later")
      self._queue.extend(rows)
      self._changed.notify()

  def cancel(self, *jobs: Job) -> None:
    """Frees the jobs' slots or takes them out of the queue; each that goes on ends "cancelled"."""
    with self._changed:
      self._cancelled |= set(jobs)
      self._changed.notify()

  def close(self) -> None:
    """Cancels what is left and ends the thread."""
    with self._changed:
      self._closing = True
      self._cancelled |= {row.job for row in (*self._queue, *self._rows) if row is not None}
      self._changed.notify()
    if self._thread.is_alive():
      self._thread.join()

  @property
  def healthy(self) -> bool:
    """Whether requests are taken."""
    return self._thread.is_alive() and not (self._closing or self._failed)

  @property
  def queued(self) -> int:
    """Jobs that wait for a slot."""
    return len(self._queue)

  @property
  def active(self) -> int:
    """Slots that are taken."""
    return sum(row is not None for row in self._rows)

  def _run(self) -> None:
    # Not an empty one: to JAX that is another setting than none, for which it compiles again.
    with contextlib.nullcontext() if self._mesh.empty else jax.set_mesh(self._mesh):
      self._serve()

  def _serve(self) -> None:
    while True:
      with self._changed:
        idle = lambda: not (self._queue or self._cancelled or self.active or self._closing)
        while idle():
          self._changed.wait()
        self._drop_cancelled()
        if self._closing and not self.active and not self._queue:
          return
        free = [slot for slot, row in enumerate(self._rows) if row is None]
        rows = self._next_rows(len(free))
        for slot, row in zip(free, rows):
          self._rows[slot] = row
      try:
        if rows:
          self._read([row.job for row in rows], free[: len(rows)])
        if self.active:
          self._step()
      except Exception as error:  # The device's state is lost: nothing can go on.
        logging.exception("the engine failed")
        self._fail(error)
        return

  def _next_rows(self, free: int) -> list[_Row]:
    """Takes jobs for the free slots from the queue, as many as one pass reads."""
    rows = []
    while self._queue and len(rows) < free:
      jobs = [row.job for row in (*rows, self._queue[0])]
      width = self._width(jobs)
      if rows and len(self._bins(jobs, width)) > self._rows_of_pass(width):
        break
      rows.append(self._queue.popleft())
    return rows

  def _width(self, jobs: list[Job]) -> int:
    """Slots of a packed row that holds the longest prompt."""
    longest = max(len(job.prompt) - 1 for job in jobs)
    return next(width for width in self._widths if width >= longest)

  def _bins(self, jobs: list[Job], width: int) -> list[list[int]]:
    """Prompts without their last tokens, packed into rows."""
    return self._packer([max(len(job.prompt) - 1, 1) for job in jobs], width)

  def _rows_of_pass(self, width: int) -> int:
    """Packed rows of one pass at most, a power of two."""
    most = max(1, min(self.slots, self._prefill_tokens // width))
    return 1 << (most.bit_length() - 1)

  def _drop_cancelled(self) -> None:
    gone = [row for row in self._queue if row.job in self._cancelled]
    for row in gone:
      self._queue.remove(row)
      self.counts.cancelled += 1
      row.job.emit(End("", "cancelled"))
    for slot, row in enumerate(self._rows):
      if row is not None and row.job in self._cancelled:
        self._end(slot, "cancelled")
    self._cancelled.clear()

  def _fail(self, error: Exception) -> None:
    with self._changed:
      self._failed = True
      waiting = list(self._queue)
      self._queue.clear()
    message = f"the engine failed: {type(error).__name__}"
    for slot in range(self.slots):
      if self._rows[slot] is not None:
        self._end(slot, "error", message)
    for row in waiting:
      row.job.emit(End("", "error", message))

  def _read(self, jobs: list[Job], slots: list[int]) -> None:
    """Reads prompts in one packed pass, and moves them into their slots."""
    width = self._width(jobs)
    bins = self._bins(jobs, width)
    packed = pack([job.prompt for job in jobs], bins)
    rows = 1 << (len(bins) - 1).bit_length()
    self._admit(packed, rows, width, jobs, slots)
    self.counts.prompt_tokens += sum(len(job.prompt) for job in jobs)
    self.counts.prefill_slots += rows * width

  def _admit(
    self, packed: PackedPrompts, rows: int, width: int, jobs: list[Job], slots: list[int]
  ) -> None:
    wide = lambda x: np.pad(
      np.asarray(x, np.int32), ((0, self.slots - len(x)), (0, 0))[: np.ndim(x)]
    )
    more = ((0, rows - packed.tokens.shape[0]), (0, width - packed.tokens.shape[1]))
    ids = [np.pad(x, more) for x in (packed.tokens, packed.positions, packed.segment_ids)]
    last = [([0, *job.prompt])[-2:] for job in jobs]
    samplings = [job.sampling for job in jobs] + [Sampling()] * (self.slots - len(jobs))
    texts = NewTexts(
      at=wide(slots),
      last=wide(np.array(last, np.int32).reshape(-1, 2)),
      keys=_keys(wide(np.array([job.seed for job in jobs], np.uint32).view(np.int32))),
      sampling=RowSampling(
        np.array([s.temperature for s in samplings], np.float32),
        np.array([s.top_k for s in samplings], np.int32),
        np.array([s.top_p for s in samplings], np.float32),
      ),
    )
    self._state = continuous.admit(
      *self._model,
      *(self._draft or (None, None)),
      self._state,
      PackedPrompts(*ids, *map(wide, packed[3:])),
      texts,
      np.int32(len(jobs)),
      self._pruning,
    )

  def _step(self) -> None:
    bias = self._bias()
    jobs = [None if row is None else row.job for row in self._rows]
    active = np.array([job is not None for job in jobs])
    if not active.any():
      return
    one_by_one = np.array([row is not None and row.one_by_one for row in self._rows])
    top = TOP if any(job is not None and job.top for job in jobs) else 0
    new = self._advance(active, bias, top, one_by_one)
    all_log_probs = new.all_log_probs
    host = jax.device_get(new._replace(all_log_probs=()))
    self.counts.steps += 1
    self.counts.occupied_slots += int(active.sum())
    single = self._draft is None and self._trees is None
    passes = host.tokens.shape[1] if single else 1
    self.counts.row_passes += int(active.sum()) * passes
    self.counts.drafted += int(host.drafted.sum())
    self.counts.accepted += int(host.accepted.sum())
    for slot in np.flatnonzero(active).tolist():
      try:
        self._hand_out(slot, host, all_log_probs)
      except Exception:  # Of one text, its tokenizer or its constraint: the others go on.
        logging.exception("a text failed")
        self._end(slot, "error", "the text could not be decoded")

  def _advance(
    self, active: np.ndarray, bias: jax.Array | None, top: int, one_by_one: np.ndarray
  ) -> NewTokens:
    """A step on the device; bool [slots], which rows take one token and no drafts."""
    limit = np.where(one_by_one, 0, self._num_drafts).astype(np.int32)
    if self._trees is not None:
      self._state, new = continuous.verify_trees(
        *self._model, self._state, active, bias, limit, self._trees, self._prompt_tokens, top
      )
    elif self._draft is None:
      # Every pass gives all rows a token: while one waits for its next bias, so do the others.
      steps = 1 if one_by_one.any() else _CHUNK
      self._state, new = continuous.decode(*self._model, self._state, active, bias, steps, top)
    else:
      self._state, new = continuous.speculate(
        *self._model,
        *self._draft,
        self._state,
        active,
        bias,
        limit,
        self._policy.state,
        self._policy.stop,
        self._num_drafts,
        top,
      )
    return new

  def _bias(self) -> jax.Array | None:
    """float32 [slots, vocab], or None where no row has one. Ends rows that can have no token."""
    rows = {slot: row for slot, row in enumerate(self._rows) if row is not None and row.biased}
    if not rows:
      return None
    masks = np.full((self.slots, -(-self.vocab_size // 8)), 255, np.uint8)
    weights = [((), ())] * self.slots
    for slot, row in rows.items():
      try:
        constraint = row.job.constraint
        mask = masks[slot] if constraint is None else constraint.packed_mask()
        of_tokens = row.weights()
      except Exception:  # Of one client's grammar: the others go on.
        logging.exception("a constraint failed")
        mask, of_tokens = np.zeros_like(masks[slot]), {}
      if _some_allowed(mask, of_tokens):
        masks[slot], weights[slot] = mask, (list(of_tokens), list(of_tokens.values()))
      else:
        self._end(slot, "error", "no token of the vocabulary continues the text as is asked")
    return logit_bias(masks, *padded_weights(weights), self.vocab_size)

  def _hand_out(self, slot: int, new: NewTokens, all_log_probs: jax.Array) -> None:
    """Gives a row's new tokens to its client, and ends it where it ends."""
    row = self._rows[slot]
    for i in range(new.counts[slot]):
      token = int(new.tokens[slot, i])
      row.count += 1
      self.counts.new_tokens += 1
      row.tokens[token] += 1
      ended = token in self._stop_tokens
      if row.job.constraint is not None:
        ended |= row.job.constraint.advance(token, lambda: np.asarray(all_log_probs[slot]))
        if row.job.finish and (ended or row.count == row.job.max_new_tokens):
          row.job.finish(ended)
      if ended:
        self._end(slot, "stop")
        return
      top = zip(new.top_tokens[slot, i].tolist(), new.top_log_probs[slot, i].tolist())
      score = Score(token, float(new.log_probs[slot, i]), list(top)[: row.job.top])
      row.job.emit(Piece(row.text.add(token), score))
      if row.text.stopped:
        self._end(slot, "stop")
        return
      if row.count == row.job.max_new_tokens:
        self._end(slot, "length")
        return

  def _end(self, slot: int, reason: str, message: str = "") -> None:
    row, self._rows[slot] = self._rows[slot], None
    setattr(self.counts, reason, getattr(self.counts, reason) + 1)
    row.job.emit(End(row.text.end(), reason, message))


def _some_allowed(mask: np.ndarray, weights: dict[int, float]) -> bool:
  """Whether a token is in the mask and has no weight of -inf."""
  allowed = np.unpackbits(mask)
  allowed[[token for token, weight in weights.items() if weight == -np.inf]] = 0
  return bool(allowed.any())


@jax.jit
def _keys(seeds: jax.Array) -> jax.Array:
  """int32 [slots] -> [slots]."""
  return jax.vmap(jax.random.key)(seeds)
