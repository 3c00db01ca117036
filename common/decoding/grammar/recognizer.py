"""An incremental recogniser of context-free languages, byte by byte.

A state is what may follow the bytes read so far: a set of threads (item, continuation). An item is
a place in an alternative, such as `sum ::= sum "+" • term`; its continuation is the set of threads
that go on when the alternative's rule is complete. Continuations are what Earley's parser looks up
in the sets of earlier positions, or an LL parser's stacks, of which ambiguous prefixes share
(a graph-structured stack). So any grammar is read in polynomial time, without recursion.

Two things keep states few, so that masks and transitions can be cached by state:

* A rule that is called at the end of an alternative gets the continuation of that alternative (a
  tail call). Repetition and right recursion do not grow the stack.
* States and continuations that are equal are one object, compared by identity. They are shared
  while anybody holds them and freed afterwards.

Left recursion: rules that call each other at their left edge (a strongly connected component of
the left-corner graph) share their callers from outside, and resume each other. Their
continuations may be cyclic.
"""

import functools
import graphlib
import heapq
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.decoding.grammar.grammar import Grammar, derivable, productive_part

Thread = tuple[int, "Continuation | None"]

# The item behind the root: the text may end.
_ACCEPT = -1
# States whose transitions are kept; more are computed again.
_CACHED_STATES = 8192


class Continuation:
  """What goes on when a rule is complete. Hashed by identity; see `Recognizer`."""

  __slots__ = ("threads", "__weakref__")

  def __init__(self, threads: frozenset[Thread]):
    self.threads = threads


class State:
  """What may follow the bytes read so far. Immutable, hashed by identity; see `Recognizer`."""

  __slots__ = ("threads", "__weakref__")

  def __init__(self, threads: frozenset[Thread]):
    self.threads = threads


class Recognizer:
  """Reads texts of a grammar, byte by byte, in any number of states at once.

  Every state can be completed to a text of the grammar: there are no dead ends.

  Attributes:
    start: the state before the first byte.
    byte_class: uint8 [256]. Bytes that no rule tells apart are of one class.
  """

  def __init__(self, grammar: Grammar):
    """Raises UserError if the grammar matches no text at all."""
    grammar = productive_part(grammar)
    self._nullable = derivable(grammar, terminals=False)
    # Items by number; the symbol behind each, None where the alternative ends.
    self._symbols: list[int | frozenset[int] | None] = [0, None]
    self._first_items: list[list[int]] = []
    for alternatives in grammar.rules:
      self._first_items.append([])
      for sequence in alternatives:
        self._first_items[-1].append(len(self._symbols))
        self._symbols += [*sequence, None]
    self._corners = [self._left_corners(items) for items in self._first_items]
    self._components()
    self.byte_class, self._classes_of = _byte_classes(self._symbols)
    self.num_classes = int(self.byte_class.max()) + 1
    self._shared: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
    self.successors = functools.lru_cache(_CACHED_STATES)(self._successors)
    end = self._share(Continuation, frozenset([(_ACCEPT, None)]))
    self.start = self._share(State, self._settle([(0, end)]))

  def accepts(self, state: State) -> bool:
    """Whether the bytes read so far are a text of the grammar."""
    return (_ACCEPT, None) in state.threads

  def advance(self, state: State | None, byte: int) -> State | None:
    """The state behind one more byte; None if no text goes on so."""
    return None if state is None else self.successors(state)[self.byte_class[byte]]

  def read(self, state: State | None, text: Iterable[int]) -> State | None:
    """`advance` over several bytes."""
    for byte in text:
      if state is None:
        return None
      state = self.successors(state)[self.byte_class[byte]]
    return state

  def _successors(self, state: State) -> list[State | None]:
    """The next state for each class of bytes."""
    behind: dict[int, set[Thread]] = {}
    for item, continuation in self._predict(state.threads):
      for c in self._classes_of[self._symbols[item]]:
        behind.setdefault(c, set()).add((item + 1, continuation))
    settled: dict[frozenset[Thread], State] = {}
    successors = [None] * self.num_classes
    for c, threads in behind.items():
      key = frozenset(threads)
      if key not in settled:
        settled[key] = self._share(State, self._settle(key))
      successors[c] = settled[key]
    return successors

  def _settle(self, threads: Iterable[Thread]) -> frozenset[Thread]:
    """Threads that wait for a byte or a rule, or accept: the complete ones resumed, and nullable
    rules also skipped."""
    pending, seen, settled = list(threads), set(threads), []
    while pending:
      item, continuation = thread = pending.pop()
      symbol = None if item == _ACCEPT else self._symbols[item]
      more = ()
      if symbol is not None or item == _ACCEPT:
        settled.append(thread)
        if isinstance(symbol, int) and self._nullable[symbol]:
          more = [(item + 1, continuation)]
      else:
        more = continuation.threads
      for thread in more:
        if thread not in seen:
          seen.add(thread)
          pending.append(thread)
    return frozenset(settled)

  def _predict(self, threads: Iterable[Thread]) -> list[Thread]:
    """All threads that wait for a byte: those given, and those of the rules they call."""
    scanning: list[Thread] = []
    # Per component: who calls its rules from outside, as (rule, thread to resume).
    callers: dict[int, set[tuple[int, Thread]]] = {}
    order: list[int] = []

    def visit(item, continuation, inside=None):
      symbol = self._symbols[item]
      if isinstance(symbol, frozenset):
        scanning.append((item, continuation))
        return
      component = self._component[symbol]
      if component == inside:
        return  # Known from the grammar, see `_recursive_continuations`.
      if component not in callers:
        callers[component] = set()
        heapq.heappush(order, component)
      for thread in self._after(item, continuation):
        callers[component].add((symbol, thread))

    for item, continuation in threads:
      if item != _ACCEPT:
        visit(item, continuation)
    # Callers come first: components are numbered so that all of a rule's callers are known.
    while order:
      component = heapq.heappop(order)
      calls = frozenset(callers[component])
      for rule, continuation in self._continuations(component, calls):
        for item in self._corners[rule]:
          visit(item, continuation, component)
    return scanning

  def _after(self, item: int, continuation: Continuation) -> Iterable[Thread]:
    """What resumes when the rule behind an item is complete: a tail call's caller's caller."""
    done = self._symbols[item + 1] is None
    return continuation.threads if done else [(item + 1, continuation)]

  def _continuations(self, component: int, calls) -> list[tuple[int, Continuation]]:
    """The rules of a component, each with its continuation."""
    rules = self._rules_of[component]
    if not self._recursive[component]:
      return [(rules[0], self._share(Continuation, frozenset(thread for _, thread in calls)))]
    made = [(rule, self._shared.get((rule, calls))) for rule in rules]
    if all(continuation for _, continuation in made):
      return made
    return self._recursive_continuations(rules, calls)

  def _recursive_continuations(self, rules, calls) -> list[tuple[int, Continuation]]:
    """Rules that call each other at their left edge resume each other: the least solution."""
    made = {rule: Continuation(frozenset()) for rule in rules}
    threads = {rule: {thread for called, thread in calls if called == rule} for rule in rules}
    returns: dict[int, set[int]] = {rule: set() for rule in rules}
    for caller in rules:
      for item in self._corners[caller]:
        called = self._symbols[item]
        if isinstance(called, int) and called in made:
          if self._symbols[item + 1] is None:
            returns[called].add(caller)
          else:
            threads[called].add((item + 1, made[caller]))
    changed = True
    while changed:
      changed = False
      for called, callers in returns.items():
        size = len(threads[called])
        threads[called].update(*(threads[caller] for caller in callers))
        changed |= len(threads[called]) > size
    for rule, continuation in made.items():
      continuation.threads = frozenset(threads[rule])
      self._shared[rule, calls] = continuation
    return list(made.items())

  def _left_corners(self, items: Iterable[int]) -> list[int]:
    """Items of a rule before which nothing need be read; those at the end left out."""
    corners = []
    for item in items:
      while (symbol := self._symbols[item]) is not None:
        corners.append(item)
        if isinstance(symbol, frozenset) or not self._nullable[symbol]:
          break
        item += 1
    return corners

  def _components(self) -> None:
    """Strongly connected components of the left-corner graph, numbered callers first."""
    count = len(self._corners)
    edges = {
      (rule, self._symbols[item])
      for rule, items in enumerate(self._corners)
      for item in items
      if isinstance(self._symbols[item], int)
    }
    rows, columns = np.array(sorted(edges) or np.zeros((0, 2)), np.int32).T
    graph = coo_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    _, labels = connected_components(graph, directed=True, connection="strong")
    callers = {int(label): set() for label in labels}
    for a, b in edges:
      if labels[a] != labels[b]:
        callers[int(labels[b])].add(int(labels[a]))
    rank = {label: i for i, label in enumerate(graphlib.TopologicalSorter(callers).static_order())}
    self._component = [rank[int(label)] for label in labels]
    self._rules_of: list[list[int]] = [[] for _ in rank]
    for rule, component in enumerate(self._component):
      self._rules_of[component].append(rule)
    self._recursive = [len(r) > 1 or (r[0], r[0]) in edges for r in self._rules_of]

  def _share(self, kind: type, threads: frozenset[Thread]):
    """The one object of a kind with these threads."""
    found = self._shared.get((kind, threads))
    if found is None:
      found = self._shared[kind, threads] = kind(threads)
    return found


def _byte_classes(symbols) -> tuple[np.ndarray, dict[frozenset[int], list[int]]]:
  """The class of each byte, uint8 [256], and the classes that make up each set of bytes."""
  terminals = {s for s in symbols if isinstance(s, frozenset)}
  member = np.zeros((256, len(terminals)), bool)
  for i, terminal in enumerate(terminals):
    member[list(terminal), i] = True
  _, byte_class = np.unique(member, axis=0, return_inverse=True)
  byte_class = byte_class.reshape(-1).astype(np.uint8)
  classes = {t: sorted({int(byte_class[byte]) for byte in t}) for t in terminals}
  return byte_class, classes
