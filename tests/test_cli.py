"""The ``rlfast`` command: what it prints, and when it exits 1."""

import json

import pytest
import torch
from typer.testing import CliRunner

import rlfast
from rlfast import backends, cli, verify
from rlfast.fallback import token_logps as fallback

runner = CliRunner()


def small(monkeypatch):
    monkeypatch.setattr(verify, "small", lambda backend: True)


def test_info():
    done = runner.invoke(cli.app, ["info", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["backends"]) == set(backends.NAMES)
    for name, state in found["backends"].items():
        assert (state == "available") == (name in backends.available())
    assert tuple(found["isa"]["available"]) == backends.isas()
    table = runner.invoke(cli.app, ["info"])
    assert table.exit_code == 0 and "instruction set" in table.stdout


def test_verify_passes_and_counts_every_cell(monkeypatch):
    small(monkeypatch)
    done = runner.invoke(cli.app, ["verify", "--backend", "torch", "--json"])
    assert done.exit_code == 0, done.output
    cells = json.loads(done.stdout)
    assert {(c["op"], c["dtype"]) for c in cells} == {(op, d) for op in backends.IMPLEMENTED for d in verify.DTYPES}
    assert all(c["status"] == "ok" and c["value_ratio"] > 0 for c in cells)


def test_verify_exits_1_on_a_wrong_backend(monkeypatch):
    small(monkeypatch)
    right = fallback.row_statistics

    def wrong(z, *rest):
        right(z * 1.0001, *rest)

    monkeypatch.setattr(fallback, "row_statistics", wrong)
    done = runner.invoke(cli.app, ["verify", "--op", "token_logps", "--backend", "torch"])
    assert done.exit_code == 1
    assert "FAILED" in done.stdout and "allowed" in done.stdout


def test_verify_names_the_way_that_is_wrong(monkeypatch):
    """An op with several ways to call it, and without a backward."""
    small(monkeypatch)
    (whole,) = verify.SUBJECTS["token_logps"]
    right = whole._replace(inputs=lambda *where: whole.inputs(*where)._replace(upstream={}))
    wrong = right._replace(name="off", public=lambda *given: {k: right.public(*given)[k] + 1 for k in right.outputs})
    monkeypatch.setitem(verify.SUBJECTS, "token_logps", (right, wrong))
    found = verify.cell("token_logps", "torch", "float32", "cpu")
    assert found.status == "FAILED" and found.gradient_ratio is None
    assert len(found.detail.split("; off ")) == len(right.outputs) and found.detail.startswith("off logp")


def test_verify_says_why_a_backend_is_not_here():
    missing = [name for name in ("cpu", "cuda") if backends.why_not(name)]
    for name in missing:
        done = runner.invoke(cli.app, ["verify", "--op", "token_logps", "--backend", name])
        assert done.exit_code == 0
        assert f"{name} is not here: {backends.why_not(name)}" in done.stdout


@pytest.mark.parametrize("arguments", [["verify", "--op", "nonesuch"], ["verify", "--backend", "nonesuch"]])
def test_unknown_names(arguments):
    done = runner.invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert "expected one of" in done.output.replace("\n", " ")


def test_bench_outside_a_clone(monkeypatch, tmp_path):
    monkeypatch.setattr(rlfast, "__file__", str(tmp_path / "rlfast" / "__init__.py"))
    done = runner.invoke(cli.app, ["bench"])
    assert done.exit_code == 1
    assert "run it from a clone" in done.stderr
