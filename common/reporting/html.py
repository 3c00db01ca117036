"""One self-contained HTML page of many papers' reports: no script, no external request."""

import base64
import dataclasses
import pathlib
from collections.abc import Sequence
from html import escape

from common.reporting.report import Claim, Report, Table, write_text


@dataclasses.dataclass(frozen=True)
class Run:
  """One paper on the page: its report, or why there is none.

  workdir: where the report's figures are.
  error: the message of a failed run, "" if it succeeded; log_tail: the last lines of its log.
  """

  slug: str
  title: str
  family: str
  workdir: pathlib.Path
  report: Report | None = None
  error: str = ""
  log_tail: str = ""


def write_page(runs: Sequence[Run], path: pathlib.Path) -> None:
  """Writes the page: a summary table, then every run's claims, tables, figures, environment."""
  reports = [run.report for run in runs if run.report]
  claims = [claim for report in reports for claim in report.claims]
  failed = len(runs) - len(reports)
  summary = (
    f"{len(runs)} papers, {sum(c.holds for c in claims)} of {len(claims)} claims held, "
    f"runs failed: {failed}, {sum(r.seconds for r in reports):.0f} s"
  )
  rows = "".join(
    f'<tr><td><a href="#{escape(r.slug)}">{escape(r.slug)}</a></td><td class="n">{_held(r)}</td>'
    f'<td class="n">{f"{r.report.seconds:.1f}" if r.report else "–"}</td>'
    f"<td>{escape(r.title)}</td><td>{escape(r.family)}</td></tr>"
    for r in runs
  )
  write_text(
    path,
    _PAGE.format(
      style=_STYLE, summary=summary, rows=rows, papers="".join(_paper_html(run) for run in runs)
    ),
  )


def _held(run: Run) -> str:
  if run.report is None:
    return '<span class="bad">✗ failed</span>'
  all_held = all(claim.holds for claim in run.report.claims)
  return f'<span class="{"good" if all_held else "bad"}">{run.report.claims_held}</span>'


def _paper_html(run: Run) -> str:
  names = " · ".join(escape(name) for name in (run.slug, run.family) if name)
  heading = (
    f'<section id="{escape(run.slug)}"><h2>{escape(run.title)}</h2>'
    f'<p class="note">{names} · <a href="#top">top</a></p>'
  )
  if run.report is None:
    return f'{heading}<p class="bad">✗ {escape(run.error)}</p><pre>{escape(run.log_tail)}</pre></section>'
  report = run.report
  claims = "".join(map(_claim_html, report.claims))
  parts = [heading, f"<ul>{claims}</ul>"]
  parts += [_table_html(table) for table in report.tables]
  for figure in report.figures:
    caption = escape(f"{figure.name}. {figure.caption}" if figure.caption else figure.name)
    parts.append(f"<figure>{_image(run.workdir / figure.path, figure.name)}")
    parts.append(f"<figcaption>{caption}</figcaption></figure>")
  facts = {"preset": report.preset, "seconds": f"{report.seconds:.1f}", **report.environment}
  items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
  parts.append(f"<details><summary>Environment</summary><dl>{items}</dl></details></section>")
  return "".join(parts)


def _claim_html(claim: Claim) -> str:
  mark = '<b class="good">✓</b>' if claim.holds else '<b class="bad">✗</b>'
  outcome = f'<span class="note">{escape(claim.outcome)}</span>'
  return f"<li>{mark} {escape(claim.statement)}<br>{outcome}</li>"


def _table_html(table: Table) -> str:
  numeric = [
    any(isinstance(row[i], int | float) for row in table.rows) for i in range(len(table.columns))
  ]
  kinds = [' class="n"' if n else "" for n in numeric]
  head = "".join(f"<th{kind}>{escape(c.name)}</th>" for kind, c in zip(kinds, table.columns))
  body = "".join(
    "<tr>"
    + "".join(
      f"<td{kind}>{f'<b>{escape(text)}</b>' if best else escape(text)}</td>"
      for kind, (text, best) in zip(kinds, row)
    )
    + "</tr>"
    for row in table.texts()
  )
  note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
  return (
    f'<h3>{escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
    f"<tbody>{body}</tbody></table></div>{note}"
  )


def _image(path: pathlib.Path, name: str) -> str:
  try:
    data = base64.b64encode(path.read_bytes()).decode()
  except OSError:
    return f'<p class="bad">figure {escape(path.name)} is missing</p>'
  return f'<img src="data:image/png;base64,{data}" alt="{escape(name)}">'


_STYLE = """
:root { color-scheme: light dark; --text: #1b1b1f; --page: #fff; --line: #d5d7dc; --soft: #5c6069;
  --shade: #f4f5f7; --link: #0b5cad; --good: #18794e; --bad: #c02626; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e5e9; --page: #16171a; --line: #3a3d44;
  --soft: #a2a6b0; --shade: #202226; --link: #79b4f5; --good: #4cc38a; --bad: #ff7b72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 60rem; color: var(--text);
  background: var(--page); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 0; line-height: 1.3; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
a { color: var(--link); }
section { border-top: 1px solid var(--line); margin-top: 2rem; padding-top: 1.5rem; }
.note, figcaption, dt { color: var(--soft); font-size: .875rem; }
.note { margin: .3rem 0; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; overflow-wrap: normal; }
th, td { padding: .4rem .7rem; text-align: left; border-bottom: 1px solid var(--line); }
th { background: var(--shade); white-space: nowrap; }
td:first-child { white-space: nowrap; }
td:not(.n):not(:first-child) { min-width: 11rem; }
tbody tr:last-child td { border-bottom: 0; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
ul { list-style: none; padding: 0; }
li { margin: .5rem 0; padding-left: 1.4rem; text-indent: -1.4rem; }
li .note { display: inline-block; text-indent: 0; }
figure { margin: 1.2rem 0; }
img { display: block; max-width: min(100%, 40rem); height: auto; background: #fff; border-radius: 6px; }
pre { overflow-x: auto; padding: .7rem; background: var(--shade); border-radius: 6px;
  font-size: .8rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .875rem; }
dd { margin: 0; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en" id="top">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Flaxworks: reproduced papers</title>
<style>{style}</style>
</head>
<body>
<h1>Flaxworks: reproduced papers</h1>
<p class="note">{summary}</p>
<div class="scroll"><table>
<thead><tr><th>paper</th><th class="n">claims</th><th class="n">seconds</th><th>title</th>
<th>family</th></tr></thead>
<tbody>{rows}</tbody>
</table></div>
{papers}
</body>
</html>
"""
