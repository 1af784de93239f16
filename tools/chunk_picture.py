"""Draw docs/fused_objective.svg: what happens to a chunk of the batch, from hidden states to gradients.

python tools/chunk_picture.py
"""

from pathlib import Path

from drawing import DONE, FAINT, INK, NOW, arrow, box, text, write

OUT = Path(__file__).resolve().parent.parent / "docs" / "fused_objective.svg"


def label(x, y, words, size=13, fill=INK):
    """Words around a point."""
    return text(x, y, words, size, "middle", fill)


def batch():
    """Hidden states in chunks, the one at work marked."""
    yield label(70, 40, "hidden [N, D]")
    for index in range(5):
        yield box(40, 56 + index * 40, 60, 40, NOW if index == 1 else DONE if index == 0 else FAINT)
    yield label(70, 76, "done", 12)
    yield label(70, 116, "a chunk", 12, fill="#fff")


def stages():
    """The logits of one chunk, and all that reads them before they are gone."""
    yield arrow(104, 116, 186, 116)
    yield label(145, 106, "1", 15)
    yield box(190, 76, 230, 80, DONE, NOW)
    yield label(305, 62, "logits z = h·Wᵀ + b")
    yield label(305, 112, "[rows of the chunk, V]", 12)
    yield label(305, 130, "float32, in memory once", 12)
    yield arrow(424, 100, 506, 100)
    yield box(510, 76, 150, 48, FAINT, NOW)
    yield label(585, 96, "logp, H of each row")
    yield label(585, 114, "one read of z", 12)
    yield arrow(664, 100, 706, 100)
    yield box(710, 76, 160, 48, FAINT, NOW)
    yield label(790, 96, "g = ∂L/∂logp")
    yield label(790, 114, "e = ∂L/∂H", 13)
    yield label(790, 62, "the loss's own kernel", 12)
    yield arrow(790, 128, 790, 196)
    yield box(510, 200, 360, 48, DONE, NOW)
    yield label(690, 220, "∂z = g·(1{v = y} − p) − e·p·(log p + H)")
    yield label(690, 238, "a tile of the vocabulary at a time, from the same logits", 12)
    yield arrow(305, 160, 506, 214)


def gradients():
    """The two products that use ∂z up."""
    yield arrow(506, 228, 424, 228)
    yield label(466, 250, "2", 15)
    yield box(190, 206, 230, 40, DONE, NOW)
    yield label(305, 231, "∂h = ∂z·W, of these rows")
    yield arrow(690, 252, 690, 282)
    yield label(706, 272, "3", 15)
    yield box(510, 286, 360, 34, DONE, NOW)
    yield label(690, 308, "∂W += ∂zᵀ·h, the whole head's, float32")
    yield arrow(186, 226, 104, 150)


def main():
    """Write the picture."""
    write(OUT, [*batch(), *stages(), *gradients()], 330)


if __name__ == "__main__":
    main()
