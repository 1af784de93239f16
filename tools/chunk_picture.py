"""Draw docs/fused_objective.svg: what happens to a chunk of the batch, from hidden states to gradients.

python tools/chunk_picture.py
"""

from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "docs" / "fused_objective.svg"
INK, FAINT, KEPT, NOW, EDGE = "#222", "#e8e8e8", "#cfe3f5", "#3b82c4", "#ffffff"
WIDTH, HEIGHT = 900, 330


def text(x, y, words, size=13, anchor="middle", fill=INK):
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def box(x, y, width, height, fill, edge=EDGE):
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{edge}"/>'


def arrow(x1, y1, x2, y2):
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.5" marker-end="url(#head)"/>'


def batch():
    """Hidden states in chunks, the one at work marked."""
    yield text(70, 40, "hidden [N, D]")
    for index in range(5):
        yield box(40, 56 + index * 40, 60, 40, NOW if index == 1 else KEPT if index == 0 else FAINT)
    yield text(70, 76, "done", 12)
    yield text(70, 116, "a chunk", 12, fill="#fff")


def stages():
    """The logits of one chunk, and all that reads them before they are gone."""
    yield arrow(104, 116, 186, 116)
    yield text(145, 106, "1", 15)
    yield box(190, 76, 230, 80, KEPT, NOW)
    yield text(305, 62, "logits z = h·Wᵀ + b")
    yield text(305, 112, "[rows of the chunk, V]", 12)
    yield text(305, 130, "float32, in memory once", 12)
    yield arrow(424, 100, 506, 100)
    yield box(510, 76, 150, 48, FAINT, NOW)
    yield text(585, 96, "logp, H of each row")
    yield text(585, 114, "one read of z", 12)
    yield arrow(664, 100, 706, 100)
    yield box(710, 76, 160, 48, FAINT, NOW)
    yield text(790, 96, "g = ∂L/∂logp")
    yield text(790, 114, "e = ∂L/∂H", 13)
    yield text(790, 62, "the loss's own kernel", 12)
    yield arrow(790, 128, 790, 196)
    yield box(510, 200, 360, 48, KEPT, NOW)
    yield text(690, 220, "∂z = g·(1{v = y} − p) − e·p·(log p + H)")
    yield text(690, 238, "a tile of the vocabulary at a time, from the same logits", 12)
    yield arrow(305, 160, 506, 214)


def gradients():
    """The two products that use ∂z up."""
    yield arrow(506, 228, 424, 228)
    yield text(466, 250, "2", 15)
    yield box(190, 206, 230, 40, KEPT, NOW)
    yield text(305, 231, "∂h = ∂z·W, of these rows")
    yield arrow(690, 252, 690, 282)
    yield text(706, 272, "3", 15)
    yield box(510, 286, 360, 34, KEPT, NOW)
    yield text(690, 308, "∂W += ∂zᵀ·h, the whole head's, float32")
    yield arrow(186, 226, 104, 150)


def main():
    parts = [*batch(), *stages(), *gradients()]
    marker = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
    )
    marker += f'<path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    back = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
    OUT.write_text("\n".join((head, marker, back, *parts, "</svg>")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
