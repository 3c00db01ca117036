import base64
import html.parser
import re

from common.reporting.html import Run, write_page
from common.reporting.report import Claim, Column, Figure, Report, Table

PNG = base64.b64decode(
  "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
EVIL = '<script>alert("x")</script>'


class _Balance(html.parser.HTMLParser):
  """Checks that tags nest, and collects them."""

  def __init__(self):
    super().__init__()
    self.open, self.tags, self.links = [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [value for name, value in attrs if name in ("href", "src")]
    if tag not in ("meta", "img", "br"):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def _page(tmp_path):
  (tmp_path / "loss.png").write_bytes(PNG)
  report = Report(
    tables=[
      Table(f"T{EVIL}", [f"m{EVIL}", Column("ppl", ".2f", "lower")], [[EVIL, 1.5], ["b", 2]])
    ],
    figures=[Figure(f"Loss{EVIL}", "loss.png", EVIL), Figure("Gone", "gone.png")],
    claims=[Claim.less(f"holds{EVIL}", [1.0], 2), Claim.less("fails", [3.0], 2)],
    preset="tiny",
    environment={"device": EVIL},
    seconds=61.0,
  )
  runs = [
    Run("awq", f"AWQ{EVIL}", f"PTQ{EVIL}", tmp_path, report),
    Run("bad", "Bad", "", tmp_path, error=f"exit code 1: {EVIL}", log_tail=f"line 1\n{EVIL}"),
  ]
  write_page(runs, tmp_path / "index.html")
  return (tmp_path / "index.html").read_text()


def test_the_page_is_self_contained_and_well_formed(tmp_path):
  parser = _Balance()
  parser.feed(_page(tmp_path))
  assert not parser.open
  assert "script" not in parser.tags and "link" not in parser.tags
  assert all(link.startswith(("#", "data:image/png;base64,")) for link in parser.links)
  assert base64.b64encode(PNG).decode() in "".join(parser.links)


def test_everything_is_escaped(tmp_path):
  page = _page(tmp_path)
  assert "<script" not in page and page.count("&lt;script&gt;") >= 11


def test_the_page_shows_claims_tables_and_failures(tmp_path):
  page = _page(tmp_path)
  assert "2 papers, 1 of 2 claims held, runs failed: 1, 61 s" in page
  assert re.search(r'class="good">✓</b> holds.*class="bad">✗</b> fails', page)
  assert "<b>1.50</b>" in page and "<b>2.00</b>" not in page
  assert "exit code 1:" in page and "line 1\n" in page
  assert "figure gone.png is missing" in page
  assert 'href="#bad"' in page and 'id="bad"' in page
