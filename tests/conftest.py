"""Backends to test, poisoned allocations, and no skip without a hardware reason."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
import torch._dynamo  # its table of torch's functions is made on import: before any of them is poisoned

from rlfast import backends, heads
from tests.rank_pool import Ranks

# What a machine may lack. Any other skip is a failure: a test that does not run must not look like one that passed.
HARDWARE_REASONS = (
    r"no CUDA device",
    r"torch sees no GPU",
    r"fewer than \d+ GiB of memory are free",
    r"the processor has no \w+",
    r"fewer than \d+ processor cores",
)


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        choices=backends.NAMES,
        help="test only this backend (repeatable). Triton's interpreter needs a process of its own: "
        "TRITON_INTERPRET=1 pytest --backend triton",
    )
    parser.addoption(
        "--full-product", action="store_true", help="every combination of the options, not pairwise-covered ones"
    )


def _bare(config) -> bool:
    """Whether this is `make test-gpu`, which installs nothing: an image may lack what only other tests need."""
    return "gpu" in config.getoption("markexpr")


def pytest_ignore_collect(collection_path, config):
    needs = {"test_properties.py": "hypothesis", "test_cli.py": "typer"}.get(collection_path.name)
    return True if needs and _bare(config) and importlib.util.find_spec(needs) is None else None


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    report = (yield).get_result()
    if report.skipped and not _bare(collector.config):
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid}: skipped as a whole: {report.longrepr[2]}"


def pytest_configure(config):
    config.addinivalue_line("markers", "backends(*names): only these, of the backends that the op has")
    config.addinivalue_line("markers", "unpoisoned: torch.empty hands out what it always does")
    if (
        "triton" in (config.getoption("--backend") or ())
        and not torch.cuda.is_available()
        and not backends.interpreting()
    ):
        raise pytest.UsageError(
            "--backend triton: there is no GPU, so Triton's interpreter is needed: set TRITON_INTERPRET=1"
        )


def backends_of(config, op: str) -> list[str]:
    """The backends of ``op`` that this run covers: the ones asked for, else all that do not need the interpreter."""
    asked = config.getoption("--backend")
    if asked:
        return [name for name in backends.IMPLEMENTED[op] if name in asked]
    return [name for name in backends.IMPLEMENTED[op] if name != "triton" or torch.cuda.is_available()]


def pytest_generate_tests(metafunc):
    """A test with ``backend`` among its arguments runs on each backend of its module's ``OP``."""
    if "backend" in metafunc.fixturenames:
        op = getattr(metafunc.module, "OP", None) or metafunc.module.__name__.split("test_")[-1]
        names = backends_of(metafunc.config, op)
        only = metafunc.definition.get_closest_marker("backends")
        names = [name for name in names if only is None or name in only.args]
        metafunc.parametrize("backend", [pytest.param(n, marks=pytest.mark.gpu) if _on_gpu(n) else n for n in names])


def _on_gpu(backend: str) -> bool:
    return backend == "cuda" or (backend == "triton" and not backends.interpreting())


def pytest_collection_modifyitems(config, items):
    """``--backend`` leaves out the tests that do not depend on it, and those that this backend is not named for.

    What is marked large or slow runs under ``--full-product``, or when ``-m`` names it.
    """
    everything, expression = config.getoption("--full-product"), config.getoption("markexpr")

    def stays(item):
        if any("empty parameter set" in str(mark.kwargs.get("reason")) for mark in item.iter_markers("skip")):
            return False
        if config.getoption("--backend") and "backend" not in getattr(item, "fixturenames", ()):
            return False
        if backends.interpreting() and item.get_closest_marker("gpu"):
            return False  # `make test-gpu` runs it
        return everything or all(m in expression or not item.get_closest_marker(m) for m in ("large", "slow"))

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = [item for item in items if stays(item)]


@pytest.fixture
def device(request):
    """Where the tensors of a test on ``backend`` live. Skips what this machine has no hardware for."""
    backend = request.getfixturevalue("backend")
    if not _on_gpu(backend):
        reason = backends.why_not(backend)
        assert reason is None, f"backend {backend}: {reason}"
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = backends.why_not(backend)
    assert reason is None, f"backend {backend}: {reason}"
    return "cuda"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(re.search(allowed, reason) for allowed in HARDWARE_REASONS):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid}: skipped without a hardware reason: {reason}"


def _poison(x):
    """What uninitialised memory may hold at its worst: NaN, an index out of any range, True."""
    if isinstance(x, torch.Tensor) and x.numel() and type(x) is torch.Tensor and x.device.type != "meta":
        if x.dtype.is_floating_point or x.dtype.is_complex:
            x.fill_(float("nan"))
        elif x.dtype == torch.bool:
            x.fill_(True)
        else:
            x.fill_(torch.iinfo(x.dtype).min // 2 + 7 if x.dtype.is_signed else torch.iinfo(x.dtype).max)
    return x


def _poisoned(allocate):
    def poisoned(*args, **kwargs):
        return _poison(allocate(*args, **kwargs))

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_allocations(request, monkeypatch):
    """``torch.empty`` and its kin hand out NaN and garbage, so that a result that was never written shows.

    ``@pytest.mark.unpoisoned`` exempts a test: lazily mapped storage of many GiB, or tracing by a compiler.
    """
    if request.node.get_closest_marker("unpoisoned"):
        return
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def small_chunks(monkeypatch):
    """A fused loss takes chunks of any number of rows."""
    monkeypatch.setattr(heads, "FEWEST_ROWS", 1)


@pytest.fixture(scope="session")
def ranks():
    """Four processes over gloo, which stay until the end: ``tests/rank_pool.py``."""
    pool = Ranks()
    yield pool
    pool.close()


@pytest.fixture
def threads():
    """Set the number of threads; put back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
