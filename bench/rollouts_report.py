"""The tables of ``bench/rollouts.py``'s results."""

from __future__ import annotations

OURS = "rlfast"
PEERS = ("generate", "generate_batch", "llama.cpp")
PARTS = ("linears", "head", "attention", "sampler", "the model's own and Python")


def measured(found: list[dict]) -> list[dict]:
    """The results that have rollouts, of each machine its own."""
    return [result for result in found if result.get("rollouts")]


def figures(result: dict) -> list[str]:
    """Tokens a second, ratios and shares; then where a decode step's time goes."""
    whole = ["rollouts", "tokens/s", *(f"× {peer}" for peer in PEERS), "of the roofline"]
    steps = ["a decode step", "ms", *PARTS, "roofline", "linears and sampler, of the roofline"]
    tables = [[whole, ["---"] * len(whole)], [steps, ["---"] * len(steps)]]
    for row in result["rollouts"]:
        name = f"{row['name']} ({row['stamp']})"
        split, share = row["split_ms"], row["share"]
        ratios = [f"{row['ratio'][peer]:.2f}" if peer in row["ratio"] else "" for peer in PEERS]
        tables[0].append([name, f"{row['arms'][OURS]['tokens_s']:.0f}", *ratios, f"{share['roofline']:.0%}"])
        parts = [f"{split[part]:.1f}" for part in ("step", *PARTS)]
        least = [f"{row['roofline_ms']['step']:.1f}", f"{share['linears and sampler']:.0%}"]
        tables[1].append([name, *parts, *least])
    return [*_lines(tables[0]), "", *_lines(tables[1])]


def _lines(table: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in table]


def outcomes(result: dict) -> list[tuple[str, str, float | None, bool | None]]:
    """(workload, what it must reach, what it reached, whether that is enough) of each target."""
    found = []
    for row in result["rollouts"]:
        for over, bound in row["setting"]["targets"]:
            value = row["share"].get(over, row["ratio"].get(over))
            text = f"{over} ≥ {bound:.0%} of the roofline" if over in row["share"] else f"≥ {bound:g}× {over}"
            text = f"≥ {bound:.0%} of the roofline" if over == "roofline" else text
            found.append((row["name"], text, value, None if value is None else value >= bound))
    return found
