"""Tables of benchmark results, for a terminal and for Markdown pages."""

import sys
from statistics import median

from rich.console import Console
from rich.table import Table

Rounds = dict[str, list[float]]  # a column, such as samples/s, and its value in every round
Race = dict[str, Rounds]  # by contender; the first is ours
Results = dict[str, Race]  # by comparison


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Ours / theirs per round: the median, with minimum and maximum in brackets."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def rows_of(race: Race) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: the median of every column; after rates, the ratio of ours to it."""
    first, *_ = race.values()
    columns = list(dict.fromkeys(column for rounds in race.values() for column in rounds))
    heads = ["contender"]
    for column in columns:
        heads += [f"{column}, higher is better", "ours / this"] if is_rate(column) else [column]
    rows = []
    for name, rounds in race.items():
        row = [name]
        for column in columns:
            values = rounds.get(column, [])
            row.append(f"{median(values):.4g}" if values else "-")
            if is_rate(column):
                row.append(ratio(first[column], values) if values else "-")
        rows.append(row)
    return heads, rows


def is_rate(column: str) -> bool:
    """True if more is better; such columns get a ratio."""
    return column.startswith("samples")


def show(results: Results) -> None:
    """Print one table per comparison."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for title, race in results.items():
        heads, rows = rows_of(race)
        table = Table(heads[0], title=title)
        for head in heads[1:]:
            table.add_column(head, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(results: Results, machine: str) -> str:
    """The same as Markdown, with the name of each comparison in bold, and the machine."""
    parts = []
    for title, race in results.items():
        heads, rows = rows_of(race)
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        parts.append(
            "\n".join([f"**{title}** ({machine})", "", *("| " + " | ".join(line) + " |" for line in lines)])
        )
    return "\n\n".join(parts) + "\n"


def summary(results: Results, machine: str) -> str:
    """One row per comparison, as Markdown: the ratio of ours to the fastest other contender.

    Variants of ours and our model in another loop, whose names begin with "our", are left out.
    """
    lines = [
        f"| samples/s, higher is better; {machine} | fastest other | ours / other (least to greatest) |",
        "| --- | --- | ---: |",
    ]
    for title, race in results.items():
        (_, first), *others = race.items()
        column = next(iter(first))
        rates = {name: median(r[column]) for name, r in others if not name.startswith("our")}
        if is_rate(column) and rates:
            name = max(rates, key=rates.__getitem__)
            lines.append(f"| {title} | {name} | {ratio(first[column], race[name][column])} |")
    return "\n".join(lines) + "\n"
