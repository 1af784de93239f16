"""The cases at small sizes: checked, and timed by pytest-benchmark.

pytest bench/ --benchmark-json=out.json
"""

from dataclasses import asdict

import pytest
import torch

from bench import arms, measure, outcome, overhead, suite

CASES = [suite.small(case) for case in suite.CASES if case.rows < 2000]


def names(case):
    """The arms that a case has on any machine."""
    ours = ["rlfast keep", "rlfast recompute"] if case.width else ["rlfast"]
    return [*ours, "eager"]


@pytest.fixture(scope="module")
def prepared():
    """Inputs and truth of a case, made once."""
    made = {}

    def prepare(case):
        if case.name not in made:
            data = suite.inputs(case)
            made[case.name] = data, measure.truth(case, data)
        return made[case.name]

    return prepare


@pytest.mark.parametrize("case, name", [pytest.param(c, n, id=f"{c.name}-{n}") for c in CASES for n in names(c)])
def test_time(benchmark, prepared, case, name):
    data, truth = prepared(case)
    run = arms.build(case, data)[name]
    assert measure.error(run(), truth) <= measure.GATES[case.dtype]
    benchmark.group = case.name
    benchmark.extra_info |= {"bytes": case.traffic, "gemm_flops": case.gemm_flops, "arm": name}
    benchmark(run)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_arm_changes_its_inputs(case):
    data = suite.inputs(case)
    before = {name: x.clone() for name, x in data.items()}
    for name, run in arms.build(case, data).items():
        if "compile" not in name:  # compiling takes most of a minute a case
            run()
            assert all(torch.equal(x, before[key]) for key, x in data.items()), name


def test_a_wrong_answer_gets_no_time():
    case = CASES[0]
    data = suite.inputs(case)
    todo = arms.build(case, data)
    wrong = {"rlfast": lambda: {"logp": todo["rlfast"]()["logp"] * 1.01}}
    _, failures = measure.checked(wrong, measure.truth(case, data), case.dtype)
    assert failures["rlfast"].startswith("wrong answer")


def test_targets_name_arms_that_exist():
    allowed = {"plain", "logits", "read", "gemms keep", "gemms recompute"}
    for case in suite.CASES:
        little = suite.small(case)
        present = set(arms.build(little, suite.inputs(little)))
        for target in case.targets:
            base = target.arm.removesuffix(" avx2").removesuffix(" baseline")
            assert base in present, (case.name, target)
            assert target.over in present | allowed | {"trl"}, (case.name, target)


def test_a_target_is_met_missed_or_not_measured():
    case = suite.CASES[0]
    result = {"case": asdict(case), "failures": {}}
    result["arms"] = {
        name: {"ms": ms, "rounds": [ms]}
        for name, ms in (("rlfast", 10.0), ("eager", 90.0), ("compile", 12.0), ("read", 7.0))
    }
    found = {o.text: (o.value, o.passed) for o in outcome.outcomes(result)}
    assert found["rlfast: ≥ 6× eager torch"] == (9.0, True)
    assert found["rlfast: ≥ 1.3× torch.compile"] == (1.2, False)
    assert found["rlfast: ≥ 60% of the read bandwidth"] == (0.7, True)
    assert found["rlfast avx2: ≥ 3× eager torch"] == (None, None)


def test_overhead_is_measured_where_the_kernels_are():
    found = overhead.measure()
    assert found is None or set(found["above_raw"]) == {"no_grad", "recording"}


def test_inputs_are_seeded():
    first, second = (suite.inputs(CASES[0])["logits"] for _ in range(2))
    assert torch.equal(first, second)
