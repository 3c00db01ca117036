import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from common.errors import UserError
from common.reporting import measurements as module
from common.reporting.measurements import Measurements, discard_measurements


class Pair(NamedTuple):
  losses: np.ndarray
  note: str | None


@dataclasses.dataclass(frozen=True)
class Outcome:
  pairs: list[Pair]
  seconds: float


CONFIG = ConfigDict({"bits": 4, "seeds": (0, 1), "nested": {"rate": 0.1}})


def never():
  raise AssertionError("measured again")


def test_a_later_run_finds_what_an_earlier_one_measured(tmp_path, capsys):
  first = Measurements(tmp_path, CONFIG)
  assert first.get("a/b", lambda: 0.1) == 0.1
  assert capsys.readouterr().err == ""
  second = Measurements(tmp_path, CONFIG)
  assert "going on with 1 measurements" in capsys.readouterr().err
  assert second.get("a/b", never) == 0.1
  discard_measurements(tmp_path)
  assert Measurements(tmp_path, CONFIG).get("a/b", lambda: 2) == 2


@pytest.mark.parametrize("change", [{"bits": 3}, {"seeds": (0,)}, {"nested": {"rate": 0.2}}])
def test_a_run_of_another_config_measures_anew(tmp_path, change):
  Measurements(tmp_path, CONFIG).get("a", lambda: 1)
  other = ConfigDict(CONFIG.to_dict() | change)
  assert Measurements(tmp_path, other).get("a", lambda: 2) == 2
  assert Measurements(tmp_path, CONFIG).get("a", never) == 1


def test_a_run_of_other_code_measures_anew(tmp_path, monkeypatch):
  Measurements(tmp_path, CONFIG).get("a", lambda: 1)
  monkeypatch.setattr(module, "_code_digest", lambda: "other")
  assert Measurements(tmp_path, CONFIG).get("a", lambda: 2) == 2


def test_values_come_back_with_their_types(tmp_path):
  pair = Pair(np.arange(6, dtype=np.float64).reshape(2, 3), None)
  value = {
    ("W2", 3): Outcome([pair, Pair(np.float32(0.1), "x")], 1.5),
    "device": (jnp.bfloat16(2), jnp.arange(3, dtype=jnp.int8), True, np.nan),
  }
  for measure in (lambda: value, never):
    found = Measurements(tmp_path, CONFIG, (Pair, Outcome)).get("a", measure)
    outcome, (scalar, codes, true, nan) = found["W2", 3], found["device"]
    assert type(outcome) is Outcome and outcome.seconds == 1.5
    assert [type(p) for p in outcome.pairs] == [Pair, Pair] and outcome.pairs[0].note is None
    np.testing.assert_array_equal(outcome.pairs[0].losses, pair.losses, strict=True)
    assert outcome.pairs[1] == (np.float32(0.1), "x")
    assert scalar == 2 and scalar.dtype == jnp.bfloat16 and true is True and np.isnan(nan)
    np.testing.assert_array_equal(codes, np.arange(3, dtype=np.int8), strict=True)


plain = st.recursive(
  st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
  lambda inner: (
    st.lists(inner)
    | st.lists(inner).map(tuple)
    | st.dictionaries(
      st.text() | st.integers(-9, 9) | st.tuples(st.text(), st.integers(0, 9)), inner
    )
  ),
  max_leaves=20,
)


@given(plain)
def test_any_plain_value_comes_back(tmp_path_factory, value):
  measurements = Measurements(tmp_path_factory.mktemp("run"), CONFIG)
  assert repr(measurements.get("a", lambda: value)) == repr(value)


def test_a_name_may_be_long(tmp_path):
  names = [f"{kind} on /data/{'sub/' * 100}" for kind in ("a", "b")]
  first, second = Measurements(tmp_path, CONFIG), Measurements(tmp_path, CONFIG)
  for name in names:
    first.get(name, lambda name=name: name)
  assert [second.get(name, never) for name in names] == names


def test_a_failed_measurement_leaves_nothing(tmp_path):
  with pytest.raises(ZeroDivisionError):
    Measurements(tmp_path, CONFIG).get("a", lambda: 1 / 0)
  assert list(tmp_path.iterdir()) == []


def test_a_type_that_was_not_named_is_refused(tmp_path):
  with pytest.raises(TypeError, match="holds a Pair, which `types` lacks"):
    Measurements(tmp_path, CONFIG).get("a", lambda: Pair(np.zeros(1), None))


def test_a_name_is_used_once(tmp_path):
  measurements = Measurements(tmp_path, CONFIG)
  measurements.get("a", lambda: 1)
  with pytest.raises(UserError, match="two measurements are named 'a'"):
    measurements.get("a", lambda: 1)


@pytest.mark.parametrize("data", [b"", b"\x81\xa4type\xa1?", b"{}"])
def test_a_damaged_file_is_named(tmp_path, data):
  Measurements(tmp_path, CONFIG).get("a", lambda: {"b": 1})
  (file,) = tmp_path.rglob("*.msgpack")
  file.write_bytes(data)
  with pytest.raises(UserError, match=r"a\.msgpack is damaged .*delete it"):
    Measurements(tmp_path, CONFIG).get("a", never)
