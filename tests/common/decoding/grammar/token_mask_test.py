import numpy as np
import pytest
import tokenizers

from common.decoding.grammar import token_mask
from common.decoding.grammar.ebnf import parse_ebnf
from common.decoding.grammar.token_mask import TokenMasks, Vocabulary, token_bytes
from common.errors import UserError
from tests.common.decoding.grammar.languages import short_texts

# Tokens that cross the borders of terminals and characters, one twice, and bytes of "é" and "語".
TOKENS = [b"", b"a", b"b", b"ab", b"ba", b"[", b"]", b"[[", b"],", b",", b"]]", b"a]", b"x", b"a"]
TOKENS += [b"\xc3", b"\xa9", b"\xa9]", "語".encode(), "語".encode()[:2], b"\x9e", b"\xaa"]
NESTED = 'root ::= "[" (item ("," item)*)? "]"\nitem ::= [abé語]+ | root'


@pytest.fixture(scope="module")
def masks():
  return TokenMasks(parse_ebnf(NESTED), Vocabulary(TOKENS, eos=0))


def allowed(masks, state):
  return {i for i in np.flatnonzero(masks.mask(state)).tolist()}


@pytest.mark.parametrize(
  "prefix",
  [b"", b"[", b"[[a", b"[]", b"[a,", b"[\xc3", "[語".encode()[:-1], b"[\xe8", b"[[a]]", b"[[],"],
)
def test_mask_is_what_can_be_completed(masks, prefix):
  """Brute force: a token is allowed if some short text of the language goes on with it."""
  language = short_texts(parse_ebnf(NESTED.replace("]+", "]")), 9)
  alive = lambda text: any(other.startswith(text) for other in language)
  # One character for each item makes the language small; the mask is then of this grammar too.
  masks = TokenMasks(parse_ebnf(NESTED.replace("]+", "]")), masks.vocabulary)
  state = masks._recognizer.read(masks.start, prefix)
  if not alive(prefix):
    assert state is None
    return
  expected = {i for i, text in enumerate(TOKENS) if text and alive(prefix + text)}
  if prefix in language:
    expected.add(0)
  assert allowed(masks, state) == expected


def test_masks_along_a_text_of_tokens(masks):
  state = masks.start
  for token in (7, 14, 16, 9, 17, 10):  # [[ é ] , 語 ]]
    assert token in allowed(masks, state) or token in (10,)
    before, state = state, masks.advance(state, token)
    if state is None:
      break
  # The last one closes two levels where there is one.
  assert state is None and 6 in allowed(masks, before)
  assert masks.read([7, 14, 16, 9, 17, 6]) is not None
  assert masks.read([7, 0]) is None
  assert masks.accepts(masks.read([5, 6])) and 0 in allowed(masks, masks.read([5, 6]))


def test_random_walks_against_the_recogniser(masks):
  rng = np.random.default_rng(0)
  for _ in range(30):
    state = masks.start
    for _ in range(12):
      mask = masks.mask(state)
      for token, text in enumerate(TOKENS):
        read = masks._recognizer.read(state, text) if text else None
        assert mask[token] == (masks.accepts(state) if token == 0 else read is not None)
      token = int(rng.choice(np.flatnonzero(mask)))
      if token == 0:
        break
      state = masks.advance(state, token)


def test_masks_stay_right_when_the_table_is_begun_anew(monkeypatch):
  monkeypatch.setattr(token_mask, "_TABLE_ROWS", 3)
  small = TokenMasks(parse_ebnf(NESTED), Vocabulary(TOKENS, eos=0))
  large = TokenMasks(parse_ebnf(NESTED), Vocabulary(TOKENS, eos=0))
  tokens = [7, 1, 8, 5, 14, 16, 9, 17]
  for i in range(len(tokens) + 1):
    one, other = small.read(tokens[:i]), large.read(tokens[:i])
    np.testing.assert_array_equal(small.mask(one), large.mask(other))
  assert len(small._states) == 1


def byte_level():
  pieces = tokenizers.pre_tokenizers.ByteLevel
  vocab = {c: i for i, c in enumerate(sorted(pieces.alphabet()))}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [tokenizers.pre_tokenizers.Digits(), pieces(add_prefix_space=False)]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(["</s>"])
  tokenizer.add_tokens([" été"])
  return tokenizer


def test_byte_level_tokens():
  tokenizer = byte_level()
  found = token_bytes(tokenizer)
  assert sorted(found[:256]) == [bytes([b]) for b in range(256)]
  for text in ("def f(x):\n\treturn 'é語😀'\x00\xad", "\r\n  \u2028"):
    ids = tokenizer.encode(text).ids
    assert b"".join(found[i] for i in ids) == text.encode()
  assert found[tokenizer.token_to_id("</s>")] == b""
  assert found[tokenizer.token_to_id(" été")] == " été".encode()
  assert Vocabulary.of(tokenizer, 300).eos == tokenizer.token_to_id("</s>")
  several = Vocabulary.of(tokenizer, 300, stop_tokens=[7, 256])
  assert (several.eos, several.stop_tokens, several.tokens[7]) == (7, (7, 256), b"")


def test_sentencepiece_tokens():
  vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
  vocab |= {f"<0x{b:02X}>": 6 + b for b in range(256)}
  model = tokenizers.models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
  )
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
  )
  tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
  found = token_bytes(tokenizer)
  assert found[:6] == [b"", b"", b"", b" ", b"a", b" a"]
  ids = tokenizer.encode("a é\n a").ids
  assert b"".join(found[i] for i in ids) == " a é\n a".encode()


def test_bad_vocabularies_are_user_errors():
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0}, unk_token="a"))
  with pytest.raises(UserError, match="expected byte-level BPE or SentencePiece"):
    token_bytes(tokenizer)
  plain = byte_level()
  plain = tokenizers.Tokenizer.from_str(plain.to_str().replace("</s>", "<stop>"))
  with pytest.raises(UserError, match="no end-of-sequence token"):
    Vocabulary.of(plain)
  with pytest.raises(UserError, match="end-of-sequence token 7 is none of the 2"):
    Vocabulary([b"a", b"b"], eos=7)
  with pytest.raises(UserError, match="the tokenizer has 3 tokens, the model 2"):
    Vocabulary([b"", b"b", b"c"], eos=0, size=2)
  with pytest.raises(UserError, match="no token has the bytes 'c'"):
    TokenMasks(parse_ebnf('root ::= "a" "c"'), Vocabulary([b"", b"a"], eos=0))
  # What can be spelled is left.
  masks = TokenMasks(parse_ebnf('root ::= "a" ("c" | "a")'), Vocabulary([b"", b"a"], eos=0))
  assert masks.accepts(masks.read([1, 1]))
  # No token is "b" alone.
  masks = TokenMasks(parse_ebnf('root ::= "a" "b" "c"'), Vocabulary([b"", b"a", b"bb", b"c"], 0))
  with pytest.raises(UserError, match="no token continues"):
    masks.mask(masks.read([1]))
