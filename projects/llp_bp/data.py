"""Binary classification sets, their splits, and random bags."""

from typing import NamedTuple

import numpy as np
from sklearn import datasets
from sklearn.model_selection import train_test_split

from common.cli import closest
from common.data.tabular import encode, read_table
from common.errors import UserError
from common.paths import data_dir

# Folder of FLAXWORKS_DATA: (file, label column, label of class 1).
_TABLES = {
  "adult": ("adult.csv", "income", ">50K"),
  "bank": ("bank.csv", "y", "yes"),
  "criteo": ("criteo.csv", "label", "1"),
}


class Split(NamedTuple):
  """Covariates standardised by the training rows, float32; labels 0 or 1."""

  x: np.ndarray
  y: np.ndarray
  validation_x: np.ndarray
  validation_y: np.ndarray
  test_x: np.ndarray
  test_y: np.ndarray


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
  """x float64 [n, d], one-hot where the column is text, and y [n], 0 or 1.

  Args:
    name: "breast_cancer", "digits" (is the digit 5 or more?), "adult", "bank", "criteo" (a file of
      FLAXWORKS_DATA, see `_TABLES`), or "cifar10" (TFDS; is it an animal?).

  Raises:
    UserError: no such set or file, or a package that it needs is missing.
  """
  if name == "breast_cancer":
    return datasets.load_breast_cancer(return_X_y=True)
  if name == "digits":
    x, y = datasets.load_digits(return_X_y=True)
    return x, (y >= 5).astype(int)
  if name == "cifar10":
    return _cifar10()
  if name not in _TABLES:
    raise UserError(
      f"unknown data set {name!r}; {closest(name, ['breast_cancer', 'digits', 'cifar10', *_TABLES])}"
    )
  file, label, positive = _TABLES[name]
  path = data_dir(name) / file
  table = read_table(path)
  if label not in table:
    raise UserError(f"{path} has no column {label!r}; {closest(label, table)}")
  # Numbers were read as float64: "1" is compared as 1.0.
  text = [f"{v:g}" if isinstance(v, float) else str(v).strip(" .") for v in table.pop(label)]
  for column, values in table.items():
    if values.dtype == object:  # Missing is a level of its own.
      table[column] = np.array(["missing" if v is None else v for v in values], object)
    else:
      table[column] = np.nan_to_num(values, nan=np.nanmedian(values))
  varying = [column for column, values in table.items() if len(set(values)) > 1]
  return encode(table, varying)[0], np.array([v == positive for v in text]).astype(int)


def _cifar10() -> tuple[np.ndarray, np.ndarray]:
  import tensorflow_datasets as tfds

  try:
    rows = tfds.data_source("cifar10", split="train")
    pairs = [(row["image"], row["label"]) for row in rows]
  except (ImportError, RuntimeError, OSError) as e:
    raise UserError(f"tfds:cifar10 cannot be prepared: {str(e).splitlines()[0]}") from None
  images, labels = (np.stack(part) for part in zip(*pairs))
  animals = np.isin(labels, [2, 3, 4, 5, 6, 7])
  return images.reshape(len(images), -1) / 255.0, animals.astype(int)


def split(x: np.ndarray, y: np.ndarray, shares: tuple[float, float], seed: int) -> Split:
  """Random stratified parts; `shares` are those of validation and test."""
  validation, test = shares
  rest, test_rows = train_test_split(
    np.arange(len(y)), test_size=test, stratify=y, random_state=seed
  )
  train, validation_rows = train_test_split(
    rest, test_size=validation / (1 - test), stratify=y[rest], random_state=seed
  )
  mean, scale = x[train].mean(axis=0), x[train].std(axis=0)
  z = ((x - mean) / np.where(scale > 0, scale, 1)).astype(np.float32)
  parts = train, validation_rows, test_rows
  return Split(*(array[rows] for rows in parts for array in (z, y)))


def random_bags(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
  """The bag of every instance [n], or -1: fewer than `size` instances are left over."""
  bags = rng.permutation(n) // size
  return np.where(bags < n // size, bags, -1)
