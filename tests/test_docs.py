"""The README and the docstrings: examples run, links lead somewhere, generated tables are what the result files say."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import rlfast
from bench import report
from rlfast import advantages, backends, parity, verify

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]
ADVANTAGES = [
    getattr(rlfast, name) for name in (*advantages.__all__, "masked_mean", "masked_whiten") if name[0].islower()
]
PUBLIC = [
    rlfast.token_logps,
    rlfast.linear_token_logps,
    rlfast.divergence,
    rlfast.linear_divergence,
    rlfast.linear,
    rlfast.loss,
    rlfast.Loss,
    rlfast.Loss.linear,
    rlfast.plan,
    rlfast.formula,
    rlfast.Correction,
    *ADVANTAGES,
    rlfast.use_backend,
    backends.active,
    parity.measure,
    verify.verify,
    rlfast.kl_penalty,
    rlfast.value_loss,
    rlfast.shape_rewards,
    rlfast.length_reward,
    rlfast.overlong_penalty,
    rlfast.clip_cov_keep,
    rlfast.kl_cov_extra,
    rlfast.top_entropy_keep,
    rlfast.rollout_keep,
    rlfast.AdaptiveKL,
    rlfast.AdaptiveEntropy,
    rlfast.RunningMeanStd,
    rlfast.ranked_loss,
    rlfast.RankedLoss,
    rlfast.paged_attention,
    rlfast.packed_attention,
    rlfast.sample,
    rlfast.linear_sample,
    rlfast.penalty_edits,
]
DOCUMENTED = (
    "token_logps", "linear_token_logps", "divergence", "linear_divergence", "linear", "use_backend", "kl_penalty",
    "value_loss", "shape_rewards", "length_reward", "preference_loss", "unpaired_loss", "ranked_loss", "reward_loss",
    "overlong_penalty", "clip_cov_keep", "kl_cov_extra", "top_entropy_keep", "rollout_keep",
    "paged_attention", "packed_attention", "sample", "linear_sample", "penalty_edits",
)  # fmt: skip


def names() -> dict:
    """What an example may use without making it."""
    return {
        "torch": torch,
        "rlfast": rlfast,
        "measure": parity.measure,
        "logits": torch.zeros(2, 7),
        "targets": torch.tensor([1, 2]),
    }


def run_examples(text: str, where: str, **more) -> int:
    """Run the ``>>>`` examples of a text, which may use ``more`` too; how many there were."""
    test = doctest.DocTestParser().get_doctest(text, names() | more, where, where, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = []
    assert runner.run(test, out=said.append).failed == 0, "".join(said)
    return len(test.examples)


@pytest.mark.parametrize("function", PUBLIC, ids=lambda f: f.__name__)
def test_docstring_examples_run(function):
    doc = inspect.getdoc(function)
    assert doc
    examples = run_examples(doc, function.__name__)
    assert examples or "Example:" not in doc


@pytest.mark.parametrize("name", [*DOCUMENTED, *(function.__name__ for function in ADVANTAGES)])
def test_a_public_function_documents_everything(name):
    function = getattr(rlfast, name)
    doc = inspect.getdoc(function)
    for part in ("Args:", "Raises:", "Example:"):
        assert part in doc, f"{name}: no {part}"
    for argument in inspect.signature(function).parameters:
        assert re.search(rf"\b{argument}\b", doc), f"{name}: {argument} is not described"


def blocks(document: str) -> list[str]:
    """The python blocks of a document."""
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("document", ["README.md", "docs/advantages.md"])
def test_examples_of_documents(document):
    code = blocks(document)
    assert code
    for block in code:
        if ">>>" in block:
            assert run_examples(block, document)
        else:
            ast.parse(block)


def test_readme_before_and_after_agree():
    hidden, head = torch.randn(6, 8), torch.nn.Linear(8, 50, bias=False)
    targets = torch.randint(50, (6,))
    before = head(hidden).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    after = rlfast.linear_token_logps(hidden, head.weight, targets, mask=torch.ones(6)).logp
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in link:
            assert (ROOT / document).parent.joinpath(link).exists(), f"{document}: {link}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:rlfast|kernels|csrc|bench|tests|tools|docs|examples)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / name).exists(), f"{document}: {name}"


def test_make_targets_and_variables_are_what_the_documents_say():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    for document in DOCUMENTS:
        named = set(re.findall(r"`make ([a-z][a-z-]*)", (ROOT / document).read_text(encoding="utf-8")))
        assert named <= targets, f"{document}: {named - targets}"
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    described = set(re.findall(r"^\| `([A-Z_]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert variables == described


def test_ci_calls_the_test_command_of_the_readme():
    assert re.search(r"^make test$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.search(r"^make test\b", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_generated_tables_are_up_to_date():
    found = report.results()
    for path in report.documents():
        text = path.read_text(encoding="utf-8")
        assert report.fill(text, found) == text, f"{path.name} is stale: run `make docs`"


def test_the_page_of_losses_is_what_the_table_says():
    from tools import loss_docs, preference_docs

    assert loss_docs.main(["--check"]) == 0, "run `make docs`"
    assert preference_docs.PAGE.read_text(encoding="utf-8") == preference_docs.page(), "run `make docs`"


def test_support_cells_come_from_result_files():
    """Each kind of cell, from files made up for it."""
    head = {
        "date": "2026-01-02",
        "commit": "abc1234",
        "device": "A CPU, 2 threads",
        "machine": {"system": "Linux x86_64"},
    }
    cell = {"op": "token_logps", "dtype": "float32", "device": "cpu"}
    ran = {**head, "verify": [{**cell, "backend": "cpu", "status": "ok", "isa": "avx2"}]}
    ran["verify"].append({**cell, "backend": "triton", "status": "interpreted"})
    ran["verify"].append({**cell, "backend": "torch", "status": "FAILED"})
    compiled = {**head, "kernels": [{"kernel": "cuda/token_logps.cu", "arch": 90}]}
    rows = {line.split("|")[2].strip(): line for line in report.support([ran, compiled]) if "| `token_logps`" in line}
    assert "*run on A CPU* (avx2), 2026-01-02, abc1234" in rows["cpu"] and "*untested*" in rows["cpu"]
    assert "*interpreted*, 2026-01-02, abc1234" in rows["triton"] and "*not yet measured*" in rows["triton"]
    assert "**fails parity** (float32)" in rows["torch"]
    assert "*compiled, never run* (sm_90)" in rows["cuda"]
