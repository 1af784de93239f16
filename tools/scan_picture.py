"""Draw docs/scan.svg: how the CPU scans rows side by side, and a long row in segments.

python tools/scan_picture.py
"""

from pathlib import Path

from drawing import DONE, FAINT, INK, NOW, arrow, box, text, write

OUT = Path(__file__).resolve().parent.parent / "docs" / "scan.svg"
CELL, LEFT, TOP = 20, 150, 64
LENGTHS = (26, 24, 24, 21, 19, 18, 18, 15)  # tokens of the rows of one vector, longest first
TILE = 16


def rows():
    """Eight rows, their last valid tokens one above the other: a vector holds one token of each."""
    yield text(LEFT, 24, "A vector holds one token of each of eight rows, and goes back through time.", 15)
    note = "Padding is left out: the sums are those of the packed row. Tiles of 16 tokens are turned in registers."
    yield text(LEFT, 44, note)
    right = LEFT + max(LENGTHS) * CELL
    for lane, length in enumerate(LENGTHS):
        y = TOP + lane * CELL
        yield text(LEFT - 12, y + 15, f"row {lane}", 12, "end")
        for back in range(length):
            fill = DONE if back < 6 else NOW if back == 6 else FAINT
            yield box(right - (back + 1) * CELL, y, CELL, CELL, fill)
    bottom = TOP + len(LENGTHS) * CELL
    yield box(right - TILE * CELL, TOP - 4, TILE * CELL, bottom - TOP + 8, "none", INK)
    yield arrow(right, bottom + 22, right - 6.5 * CELL, bottom + 22)
    yield text(right - 6 * CELL, bottom + 44, "G = r + γ·((1 − λ)·V′ + λ·G′), in float64", 13, "middle")
    yield text(right - (TILE + 0.5) * CELL, bottom + 26, "a tile", 12, "end")


def segments(top):
    """A long row: each segment is a map of the state that comes from its right."""
    yield text(LEFT, top, "A row of more than 65536 tokens: its segments are the rows of a vector.", 15)
    yield text(LEFT, top + 20, "First all maps, side by side; then the carries, one after another; then all outputs.")
    width, y = 165, top + 40
    for index in range(3):
        x = LEFT + index * (width + 12)
        yield box(x, y, width, 34, DONE, NOW)
        yield text(x + width / 2, y + 22, f"G = P{'₁₂₃'[index]}·carry + Q{'₁₂₃'[index]}", 13, "middle")
        if index:
            yield arrow(x + 14, y + 52, x - 26, y + 52)
            yield text(x - 6, y + 70, "carry", 12, "middle")


def main():
    """Write the picture."""
    second = TOP + len(LENGTHS) * CELL + 96
    write(OUT, [*rows(), *segments(second)], second + 130)


if __name__ == "__main__":
    main()
