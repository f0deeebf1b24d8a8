"""The audit as one HTML page that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_pipeline.audit.audit import LENGTH_EDGES, Audit, SourceAudit
from data_pipeline.audit.phases import AuditedPhases
from data_pipeline.audit.shown_conversation import ShownConversation
from data_pipeline.charts import Bar, as_svg, draw_bars, draw_columns, inline, new_figure
from data_pipeline.escaping import escaped_text
from data_pipeline.fates.dropped import DROPPED_COLUMNS
from data_pipeline.mixture.plan_figure import draw_phases

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LANGUAGES = 8
"""Languages of a source that are shown, the most frequent ones."""
_STYLE = """
body {
  font: 15px/1.5 sans-serif; color: #1a202c; max-width: 1000px; margin: 2em auto; padding: 0 1em;
}
h1 { font-size: 1.5em }
h2 { font-size: 1.15em; margin-top: 2em; border-top: 1px solid #e2e8f0; padding-top: 1em }
table { border-collapse: collapse }
td, th { padding: 3px 10px; text-align: right; border-bottom: 1px solid #e2e8f0 }
td:first-child, th:first-child { text-align: left } .bad { color: #c53030; font-weight: bold }
figure { margin: 1em 0 } figure svg { max-width: 100%; height: auto }
pre { white-space: pre-wrap; background: #f7fafc; padding: .6em }
mark { background: #c6f6d5; color: inherit; border-bottom: 2px solid #38a169 }
"""
_HEADER = (
    "source",
    "label",
    "documents",
    "mislabelled",
    "mojibake",
    "control",
    "copies",
    "rejected",
    "NFKC changes",
    "NFKC damages",
    "tokens",
    "learned tokens",
)


def audit_page(
    audit: Audit,
    dropped: Sequence[Sequence[str]] = (),
    built: str = "the build of this mix",
    phases: AuditedPhases | None = None,
) -> str:
    """Return the whole page.

    Args:
        audit: The figures.
        dropped: Rows of what a build of the mix dropped (`dropped.dropped_rows`).
        built: Which build that is.
        phases: What the mix makes of its sources over a run.
    """
    mix = html.escape(audit.mix)
    sources = "".join(_source(source) for source in audit.sources)
    return escaped_text(
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Audit of {mix}</title>'
        f"<style>{_STYLE}</style></head><body><h1>Audit of the mix {mix}</h1>{_verdict(audit)}"
        f"{_audit_table(audit)}{_dropped_table(dropped, built)}{_phases(phases)}"
        f"{_figure(_draw_overview(audit), 'shares and token rates of all sources')}"
        f"{sources}</body></html>\n"
    )


def _verdict(audit: Audit) -> str:
    problems = audit.problems()
    if not problems:
        limit = f"{audit.max_mislabelled_share:.0%}"
        return f"<p>Every source is in the language of its label (limit {limit}).</p>"
    return "".join(f'<p class="bad">{html.escape(line)}</p>' for line in problems)


def _audit_table(audit: Audit) -> str:
    return _table(_HEADER, [_cells(source) for source in audit.sources])


def _dropped_table(rows: Sequence[Sequence[str]], built: str) -> str:
    if not rows:
        return ""
    return f"<h2>What {html.escape(built)} dropped</h2>{_table(DROPPED_COLUMNS, rows)}"


def _phases(phases: AuditedPhases | None) -> str:
    """Return the phases with their figures, and weights that follow from epochs."""
    if phases is None or not phases.describe():
        return ""
    page = "<h2>Over a run</h2>"
    for line in (phases.weights, *phases.note.splitlines()):
        if line:
            page += f"<p>{html.escape(line)}</p>"
    for shown in phases.tables:
        page += f"<p>{html.escape(shown.title)}</p>{_table(shown.columns, shown.rows)}"
        if shown.plan is not None:
            page += _figure(draw_phases(shown.plan), shown.title)
    return page


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _cells(source: SourceAudit) -> list[str]:
    documents = max(source.documents, 1)
    return [
        source.name,
        source.language,
        f"{source.documents:,}",
        f"{source.mislabelled_share:.2%}",
        f"{source.mojibake / documents:.2%}",
        f"{source.control / documents:.2%}",
        f"{source.duplicates / documents:.2%}",
        f"{source.rejected / max(source.documents + source.rejected, 1):.2%}",
        f"{source.nfkc_changed / documents:.2%}",
        f"{source.nfkc_damaged / documents:.2%}",
        f"{source.document_tokens:,}",
        f"{source.learned_tokens:,}",
    ]


def _source(source: SourceAudit) -> str:
    name = html.escape(f"{source.name} ({source.language})")
    items = "".join(f"<li>{html.escape(fact)}</li>" for fact in _facts(source))
    figure = _figure(_draw_source(source), f"lengths and languages of {source.name}")
    page = f"<h2>{name}</h2><ul>{items}</ul>{figure}"
    examples = "".join(f"<pre>{html.escape(example)}</pre>" for example in source.examples)
    if examples:
        page += f"<p>In another language than the label, first few:</p>{examples}"
    if source.conversation is not None:
        page += _conversation(source.conversation)
    return page


def _conversation(shown: ShownConversation) -> str:
    """Return a conversation with its learned tokens marked."""
    pieces = ""
    for text, is_learned in shown.pieces:
        piece = html.escape(text)
        pieces += f"<mark>{piece}</mark>" if is_learned else piece
    title = html.escape(shown.title)
    return f"<p>A conversation; <mark>what is learned</mark>. {title}</p><pre>{pieces}</pre>"


def _facts(source: SourceAudit) -> list[str]:
    facts = [
        f"{source.tokens_per_character:.3f} tokens per character, "
        f"{source.bytes / max(source.tokens, 1):.2f} bytes per token",
        f"NFKC would change {source.nfkc_changed:,} documents and take the meaning of characters "
        f"in {source.nfkc_damaged:,}",
    ]
    if source.rejects:
        facts.append(f"cannot be used: {source.describe_rejects()}")
    for kind, count in sorted(source.notes.items()):
        facts.append(f"{kind}: {count:,} documents")
    return facts


def _figure(svg: str, title: str) -> str:
    label = html.escape(title, quote=True)
    return f'<figure role="img" aria-label="{label}">{inline(svg)}</figure>'


@as_svg
def _draw_overview(audit: Audit) -> Figure:
    """Draw the tokens per character of all sources, and the mislabelled documents if any are."""
    limit = audit.max_mislabelled_share
    shares = []
    rates = []
    for source in audit.sources:
        share = source.mislabelled_share
        shares.append(Bar(source.name, share, f"{share:.2%}", limit, share > limit))
        rate = source.tokens_per_character
        rates.append(Bar(source.name, rate, f"{rate:.3f}"))
    height = 50 + 24 * len(audit.sources)
    charts = {"Tokens per character": rates}
    if any(bar.value for bar in shares):
        title = "Share of documents in another language than the label (tick: limit)"
        charts = {title: shares, **charts}
    figure, places = new_figure(640, height * len(charts), rows=len(charts))
    for axes, (title, bars) in zip(places, charts.items(), strict=True):
        draw_bars(axes, title, bars)
    return figure


@as_svg
def _draw_source(source: SourceAudit) -> Figure:
    """Draw how long the documents of a source are, and in which languages."""
    figure, (left, right) = new_figure(960, 230, columns=2)
    edges = [_short(edge) for edge in LENGTH_EDGES]
    draw_columns(left, "Documents by characters", source.lengths, edges)
    languages = []
    for name, count in source.languages.most_common(MAX_LANGUAGES):
        languages.append(Bar(name, count, f"{count:,}", alarm=name != source.language))
    draw_bars(right, "Language found, documents", languages, room_for=MAX_LANGUAGES)
    return figure


def _short(number: int) -> str:
    if number >= 2**20:
        return f"{number // 2**20}M"
    if number >= 1024:
        return f"{number // 1024}k"
    return str(number)
