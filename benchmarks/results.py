"""What the benchmarks find, as tables: for a terminal, and for a README."""

import sys
from statistics import median

from rich.console import Console
from rich.table import Table

Rounds = dict[str, list[float]]  # a column, such as samples/s, and its value in every round
Race = dict[str, Rounds]  # by contender; the first is ours
Results = dict[str, Race]  # by comparison


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Ours over theirs, round by round: the median, and in brackets the least and the greatest."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def rows_of(race: Race) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: every column's median, and behind the rates how many times as much ours has."""
    first, *_ = race.values()
    columns = list(dict.fromkeys(column for rounds in race.values() for column in rounds))
    heads = ["contender"]
    for column in columns:
        heads += [column, "ours / this"] if is_rate(column) else [column]
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
    """Whether more is better and a ratio is wanted."""
    return column.startswith("samples")


def show(results: Results) -> None:
    """Print a table a comparison."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    for title, race in results.items():
        heads, rows = rows_of(race)
        table = Table(heads[0], title=title)
        for head in heads[1:]:
            table.add_column(head, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def markdown(results: Results) -> str:
    """The same for a README, every comparison under its name in bold."""
    parts = []
    for title, race in results.items():
        heads, rows = rows_of(race)
        lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
        parts.append("\n".join([f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def summary(results: Results) -> str:
    """One row per comparison, as Markdown: the ratio of ours to the fastest other contender.

    Variants of ours, whose names begin with "ours", are left out.
    """
    lines = [
        "| comparison, samples/s | fastest other | ours / other (least to greatest) |",
        "| --- | --- | ---: |",
    ]
    for title, race in results.items():
        (_, first), *others = race.items()
        column = next(iter(first))
        rates = {name: median(r[column]) for name, r in others if not name.startswith("ours")}
        if is_rate(column) and rates:
            name = max(rates, key=rates.__getitem__)
            lines.append(f"| {title} | {name} | {ratio(first[column], race[name][column])} |")
    return "\n".join(lines) + "\n"
