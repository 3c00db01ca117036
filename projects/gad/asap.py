"""ASAp, adaptive sampling with approximate expected futures: the sampler's side of the trie.

The model's distribution under the condition that a text is of the grammar is, token by token,
Q(a | u) ~ P(a | u) c(ua). Masks alone (GCD) put 1[ua can be completed] in the place of c; ASAp puts
c~, the trie's upper bound, which each sample brings closer to c. The first sample is GCD's.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from common.decoding.constrained import Completion, Prompts, decode
from common.decoding.generation import Sampling
from common.decoding.grammar.token_mask import TokenMasks
from common.errors import UserError
from common.models.decoder import Decoder
from projects.gad.trie import Propagation, Trie


def asap_sample(
  model: Decoder,
  prompts: Prompts,
  masks: Sequence[TokenMasks],
  tries: Sequence[Trie],
  *,
  key: jax.Array,
  temperature: float = 1.0,
  propagation: Propagation = "root",
) -> list[Completion]:
  """One sample behind each prompt, which its trie learns from.

  Args:
    model: that read the prompts.
    prompts: of `read_prompts`, with the same limit of tokens whenever a trie is used.
    masks, tries: of each row. Samples of one prompt follow each other, and rows are different
      prompts (or different experiments): a row knows nothing of the others' tries.
    key: for sampling.
    temperature: of P. Top-k and top-p would change P behind the trie's back.

  Raises:
    UserError: the temperature is 0, or no text of a grammar fits into the limit of tokens.
  """
  if temperature <= 0:
    raise UserError(f"temperature={temperature}: ASAp samples, expected a positive one")
  constraints = [AsapConstraint(m, t, propagation) for m, t in zip(masks, tries, strict=True)]
  found = decode(model, prompts, constraints, key=key, sampling=Sampling(temperature))
  for constraint, completion in zip(constraints, found):
    constraint.finish(completion.complete)
  return found


class AsapConstraint:
  """Steers one sample by a trie, and teaches it to the trie; see `common.decoding.constrained`.

  Attributes:
    path: nodes from the root to the last token so far.
  """

  def __init__(self, masks: TokenMasks, trie: Trie, propagation: Propagation = "root"):
    self.masks, self.trie, self.propagation = masks, trie, propagation
    self.state = masks.start
    self.path = [trie.root]

  def packed_mask(self) -> np.ndarray:
    return self.masks.packed(self.state)

  def log_weights(self) -> tuple[Sequence[int], Sequence[float]]:
    """log c~ of the tokens that were chosen here before; it is 0 for all others."""
    node = self.path[-1]
    log_success = [child.log_success for child in node.children.values()]
    if node.log_rest == -np.inf and max(log_success) == -np.inf:
      if self.propagation == "root":
        raise UserError("no text of the grammar fits into max_new_tokens: raise it")
      return (), ()  # A dead end that the node's parent was not told of.
    return tuple(node.children), log_success

  def advance(self, token: int, log_p: Callable[[], np.ndarray]) -> bool:
    node = self.path[-1]
    child = node.children.get(token)
    if child is None:
      child = self.trie.insert(node, token, log_p(), self.masks.mask(self.state))
    self.path.append(child)
    if token == self.masks.vocabulary.eos:
      return True
    self.state = self.masks.advance(self.state, token)
    return False

  def finish(self, complete: bool) -> None:
    """Updates the trie, once the sample is a text or has run out of room."""
    if not complete:
      self.path[-1].log_success = -np.inf
    self.trie.update(self.path, self.propagation)
