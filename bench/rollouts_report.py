"""The tables of ``bench/rollouts.py``'s results."""

from __future__ import annotations

OURS = "rlfast"
PEERS = {
    "cpu": ("generate", "generate_batch", "llama.cpp"),
    "cuda": ("generate", "generate_batch", "vLLM", "nano-vllm"),
}
PARTS = {
    "cpu": ("linears", "head", "attention", "sampler", "the model's own and Python"),
    "cuda": ("forward", "head and sampler", "scheduler and Python"),
}


def measured(found: list[dict]) -> list[dict]:
    """The results that have rollouts, of each machine its own."""
    return [result for result in found if result.get("rollouts")]


def place(result: dict) -> str:
    """Where it was measured: "cpu" or "cuda"."""
    return "cuda" if "gpu" in result["machine"] else "cpu"


def figures(result: dict) -> list[str]:
    """Tokens a second, ratios and shares; then where a decode step's time goes."""
    device = place(result)
    peers, parts = PEERS[device], PARTS[device]
    busy = "linears and sampler"
    whole = ["rollouts", "tokens/s", *(f"× {peer}" for peer in peers), "of the roofline"]
    steps = ["a decode step", "ms", *parts, "roofline", *([f"{busy}, of the roofline"] if device == "cpu" else [])]
    tables = [[whole, ["---"] * len(whole)], [steps, ["---"] * len(steps)]]
    for row in result["rollouts"]:
        name = f"{row['name']} ({row['stamp']})"
        split, share = row["split_ms"], row["share"]
        ratios = [f"{row['ratio'][peer]:.2f}" if peer in row["ratio"] else "" for peer in peers]
        tables[0].append([name, f"{row['arms'][OURS]['tokens_s']:.0f}", *ratios, f"{share['roofline']:.0%}"])
        spent = [f"{split[part]:.1f}" for part in ("step", *parts)]
        least = [f"{row['roofline_ms']['step']:.1f}", *([f"{share[busy]:.0%}"] if busy in share else [])]
        tables[1].append([name, *spent, *least])
    return [*_lines(tables[0]), "", *_lines(tables[1])]


def _lines(table: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in table]


def outcomes(result: dict) -> list[tuple[str, str, float | None, bool | None]]:
    """(workload, what it must reach, what it reached, whether that is enough) of each target."""
    found = []
    for row in result["rollouts"]:
        for over, bound in row["setting"]["targets"]:
            value = row["share"].get(over, row["ratio"].get(over))
            found.append((row["name"], text(over, bound), value, None if value is None else value >= bound))
    return found


def text(over: str, bound: float) -> str:
    """A target in words."""
    if over == "roofline":
        return f"≥ {bound:.0%} of the roofline"
    return f"{over} ≥ {bound:.0%} of the roofline" if over == "linears and sampler" else f"≥ {bound:g}× {over}"
