"""A paraphrase by rules: synonyms, contractions and format, word by word.

It stands in for the paper's ChatGPT. Every word stays one word, so that excerpts keep their length,
and the same text always has the same paraphrase.
"""

import re

_PAIRS = """
return|yield  returns|yields  value|item  values|items  list|sequence  argument|parameter
arguments|parameters  function|routine  functions|routines  method|procedure  methods|procedures
object|entity  objects|entities  create|make  creates|makes  call|invoke  called|invoked
get|fetch  set|assign  use|employ  used|employed  uses|employs  given|supplied  given.|supplied.
default|standard  error|failure  errors|failures  exception|fault  name|label  names|labels
file|document  files|documents  string|text  strings|texts  number|count  result|outcome
data|contents  new|fresh  first|initial  last|final  same|identical  all|every  any|some
if|when  whether|if  because|since  however|though  also|too  only|just  not|never
must|should  can|may  cannot|can't  do|perform  does|performs  start|begin  end|finish
read|load  write|store  open|access  close|release  check|test  found|located  raise|throw
raised|thrown  remove|delete  add|append  change|modify  changes|modifies  large|big  small|little
self|this  cls|klass  i|index  x|u  key|entry  line|row  path|location  msg|message  args|rest
kwargs|options  obj|thing  node|vertex  size|extent  length|len  buf|buffer  tmp|temporary
don't|dont  doesn't|doesnt  isn't|isnt  it's|its  e.g.|like  i.e.|namely  true|yes  false|no
array|vector  matrix|table  input|source  output|target  shape|form  type|kind  class|category
"""
_SYNONYMS = dict(pair.split("|") for pair in _PAIRS.split())
_CORE = re.compile(r"[A-Za-z_][A-Za-z_.']*[A-Za-z_]|[A-Za-z_]")
_WORD = re.compile(r"\S+")
_QUOTES = str.maketrans({'"': "'", "'": '"'})


def _synonym(match: re.Match) -> str:
  word = match[0]
  other = _SYNONYMS.get(word.lower())
  if other is None:
    return word
  return other.capitalize() if word[0].isupper() else other


def _reword(match: re.Match) -> str:
  word = _CORE.sub(_synonym, match[0])
  # An apostrophe inside of a word is no quotation mark.
  return word if re.search(r"\w'\w", word) else word.translate(_QUOTES)


def paraphrase(text: str) -> str:
  """The text in other words: synonyms, and the other kind of quotation marks. White space stays."""
  return _WORD.sub(_reword, text)
