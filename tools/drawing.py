"""The words of the drawings in docs/: text, boxes, arrows."""

from pathlib import Path

INK, FAINT, DONE, NOW, EDGE = "#222", "#e8e8e8", "#cfe3f5", "#3b82c4", "#ffffff"
WIDTH = 900


def text(x, y, words, size=13, anchor="start", fill=INK):
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def box(x, y, width, height, fill, edge=EDGE):
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{edge}"/>'


def arrow(x1, y1, x2, y2):
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def write(path: Path, parts, height: int) -> None:
    """A picture of these parts."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">\n'
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto">'
        f'<path d="M0,0 L7,3 L0,6 z" fill="{INK}"/></marker></defs>\n<rect width="100%" height="100%" fill="white"/>\n'
    )
    path.write_text(head + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")
