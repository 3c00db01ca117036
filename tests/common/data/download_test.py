import gzip
import hashlib

import numpy as np
import pandas as pd
import pytest
import rdata

from common.data import download
from common.errors import UserError

TEXT = b"some text\n" * 1000


@pytest.fixture
def site(monkeypatch, tmp_path):
  """Serves `toy` (data) and `toy-model` from a local folder; returns where data goes."""
  (tmp_path / "site").mkdir()
  (tmp_path / "site" / "text.txt").write_bytes(TEXT)
  url = (tmp_path / "site" / "text.txt").as_uri()
  digest = hashlib.sha256(TEXT).hexdigest()
  monkeypatch.setenv("FLAXWORKS_DATA", str(tmp_path / "data"))
  monkeypatch.setenv("FLAXWORKS_MODELS", str(tmp_path / "models"))
  data = {
    "toy": [
      download.Remote(url, "text.txt.gz", digest),
      download.Remote(url, "text.txt", None),
    ],
    "changed": [download.Remote(url, "text.txt", "0" * 64)],
    "gone": [
      download.Remote(url, "text.txt", digest),
      download.Remote(f"{url}.old", "b.txt", None),
    ],
    "gone-first": [download.Remote(f"{url}.old", "b.txt", None)],
  }
  monkeypatch.setattr(download, "DATA", data)
  monkeypatch.setattr(download, "MODELS", {"toy-model": [download.Remote(url, "w", digest)]})
  return tmp_path / "data"


def test_download(site):
  folder = download.download("toy")
  assert folder == site / "toy"
  assert gzip.decompress((folder / "text.txt.gz").read_bytes()) == TEXT
  assert (folder / "text.txt").read_bytes() == TEXT
  assert sorted(p.name for p in folder.iterdir()) == ["text.txt", "text.txt.gz"]
  assert download.download("toy-model") == site.parent / "models" / "toy-model"


def test_files_that_are_there_are_kept(site):
  (site / "toy").mkdir(parents=True)
  (site / "toy" / "text.txt").write_bytes(b"mine")
  download.download("toy")
  assert (site / "toy" / "text.txt").read_bytes() == b"mine"
  assert (site / "toy" / "text.txt.gz").exists()


def test_without_the_variables_it_goes_to_the_cache(site, monkeypatch, tmp_path):
  monkeypatch.delenv("FLAXWORKS_DATA")
  monkeypatch.setenv("FLAXWORKS_CACHE", str(tmp_path / "cache"))
  assert download.download("toy") == tmp_path / "cache" / "data" / "toy"


def test_a_data_frame_of_r_becomes_csv(site, monkeypatch):
  frame = pd.DataFrame({"rating": [1.5, np.nan, 3.0], "taste": pd.Categorical(["a", "b", "a"])})
  source = site.parent / "site" / "frame.rda"
  rdata.write_rda(source, {"frame": frame})
  digest = hashlib.sha256(source.read_bytes()).hexdigest()
  remote = download.Remote(source.as_uri(), "frame.csv", digest)
  monkeypatch.setitem(download.DATA, "of-r", [remote])
  folder = download.download("of-r")
  assert (folder / "frame.csv").read_text() == "rating,taste\n1.5,a\n,b\n3.0,a\n"
  assert [p.name for p in folder.iterdir()] == ["frame.csv"]


def test_a_changed_file_is_refused(site):
  with pytest.raises(UserError, match="is not the file that it was: its SHA-256 is"):
    download.download("changed")
  assert not (site / "changed").exists()


def test_an_unreachable_file(site):
  with pytest.raises(UserError, match="cannot fetch file:.*text.txt.old: .*No such file"):
    download.download("gone")
  assert [p.name for p in (site / "gone").iterdir()] == ["text.txt"]
  with pytest.raises(UserError, match="cannot fetch"):
    download.download("gone-first")
  assert not (site / "gone-first").exists()


def test_an_interrupted_download_leaves_no_file(site, monkeypatch):
  def interrupted(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(download.os, "replace", interrupted)
  with pytest.raises(KeyboardInterrupt):
    download.download("toy")
  assert not (site / "toy").exists()


def test_a_folder_that_cannot_be_written(site, monkeypatch):
  (site.parent / "blocked").write_text("a file")
  monkeypatch.setenv("FLAXWORKS_DATA", str(site.parent / "blocked"))
  with pytest.raises(UserError, match="cannot write to the folder"):
    download.download("toy")


def test_an_unknown_name(site):
  with pytest.raises(UserError, match="unknown download 'nothing'; there are .*toy, toy-model"):
    download.download("nothing")
  with pytest.raises(UserError, match="usage: .*NAME"):
    download.main(["download"])


def test_main_prints_the_folders(site, capsys):
  download.main(["download", "toy", "toy-model"])
  assert capsys.readouterr().out.split() == [
    str(site / "toy"),
    str(site.parent / "models" / "toy-model"),
  ]


def test_the_table_names_pinned_files():
  for remotes in (*download.DATA.values(), *download.MODELS.values()):
    for remote in remotes:
      assert remote.url.startswith("https://") and "/main/" not in remote.url
      assert remote.sha256 is None or len(remote.sha256) == 64
