"""Tables as text."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown.

    >>> print(markdown_table(("layer", "ms"), [("conv1", "2.5")]))
    | layer | ms |
    | --- | --- |
    | conv1 | 2.5 |
    """
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))
