"""The audit as one HTML page that needs no other file."""

from __future__ import annotations

import html

from data_pipeline.audit.audit import LENGTH_EDGES, Audit, SourceAudit
from data_pipeline.charts import Bar, bars, columns

_STYLE = """
body { font: 15px/1.5 sans-serif; color: #1a202c; max-width: 1000px; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-top: 1px solid #e2e8f0; padding-top: 1em }
table { border-collapse: collapse } td, th { padding: 3px 10px; text-align: right; border-bottom: 1px solid #e2e8f0 }
td:first-child, th:first-child { text-align: left } .bad { color: #c53030; font-weight: bold }
.charts { display: flex; flex-wrap: wrap; gap: 1em } pre { white-space: pre-wrap; background: #f7fafc; padding: .6em }
"""


def audit_page(audit: Audit) -> str:
    """The whole page."""
    problems = audit.problems()
    verdict = (
        "".join(f'<p class="bad">{html.escape(line)}</p>' for line in problems)
        or f"<p>Every source is in the language of its label (limit {audit.max_mislabelled_share:.0%}).</p>"
    )
    limit = audit.max_mislabelled_share
    overview = [
        bars(
            "Share of documents in another language than the label (tick: limit)",
            [Bar(s.name, s.mislabelled_share, f"{s.mislabelled_share:.2%}", limit, s.mislabelled_share > limit)
             for s in audit.sources],
        ),
        bars(
            "Tokens per character",
            [Bar(s.name, s.tokens_per_character, f"{s.tokens_per_character:.3f}") for s in audit.sources],
        ),
    ]  # fmt: skip
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Audit of {html.escape(audit.mix)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>Audit of the mix {html.escape(audit.mix)}</h1>{verdict}"
        f'{_table(audit)}<div class="charts">{"".join(overview)}</div>{"".join(map(_source, audit.sources))}'
        "</body></html>\n"
    )


def _table(audit: Audit) -> str:
    header, *rows = _cells(audit)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cells(audit: Audit) -> list[list[str]]:
    header = [
        "source",
        "label",
        "documents",
        "mislabelled",
        "mojibake",
        "control",
        "copies",
        "rejected",
        "tokens",
    ]
    rows = []
    for s in audit.sources:
        counts = (s.mojibake, s.control, s.duplicates)
        shares = [
            f"{s.mislabelled_share:.2%}",
            *(f"{count / max(s.documents, 1):.2%}" for count in counts),
        ]
        rejected = f"{s.rejected / max(s.documents + s.rejected, 1):.2%}"
        rows.append([s.name, s.language, f"{s.documents:,}", *shares, rejected, f"{s.tokens:,}"])
    return [header, *rows]


def _source(source: SourceAudit) -> str:
    languages = [
        Bar(name, count, f"{count:,}", alarm=name != source.language)
        for name, count in source.languages.most_common(8)
    ]
    charts = columns(
        "Documents by characters", source.lengths, [_short(edge) for edge in LENGTH_EDGES]
    )
    if languages:
        charts += bars("Language found, documents", languages, 480)
    facts = [
        f"{source.tokens_per_character:.3f} tokens per character, {source.bytes / max(source.tokens, 1):.2f} bytes per "
        "token",
        f"NFKC would change {source.nfkc_changed:,} documents and take the meaning of characters in "
        f"{source.nfkc_damaged:,}",
        *(f"{kind}: {count:,} documents" for kind, count in sorted(source.notes.items())),
    ]
    items = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    examples = "".join(f"<pre>{html.escape(example)}</pre>" for example in source.examples)
    shown = f"<p>In another language than the label, first few:</p>{examples}" if examples else ""
    name = html.escape(f"{source.name} ({source.language})")
    return f'<h2>{name}</h2><ul>{items}</ul><div class="charts">{charts}</div>{shown}'


def _short(number: int) -> str:
    return (
        f"{number // 2**20}M"
        if number >= 2**20
        else f"{number // 1024}k"
        if number >= 1024
        else str(number)
    )
