"""The cases at small sizes: checked, and timed by pytest-benchmark.

pytest bench/ --benchmark-json=out.json
"""

import json
from dataclasses import asdict, replace

import pytest
import torch

from bench import arms, measure, outcome, overhead, report, suite
from bench.case import Target
from bench.run import updated

CASES = [case.small() for case in suite.CASES if case.isas]  # the others are there twice: at a larger size


def names(case):
    """The arms that a case has on any machine."""
    return [*case.OURS, "eager"]


@pytest.fixture(scope="module")
def prepared():
    """Inputs and truth of a case, made once."""
    made = {}

    def prepare(case):
        if case.name not in made:
            data = case.inputs()
            made[case.name] = data, case.truth(data)
        return made[case.name]

    return prepare


@pytest.mark.parametrize("case, name", [pytest.param(c, n, id=f"{c.name}-{n}") for c in CASES for n in names(c)])
def test_time(benchmark, prepared, case, name):
    data, truth = prepared(case)
    run = arms.build(case, data)[name]
    assert measure.error(run(), truth) <= case.gate
    benchmark.group = case.name
    benchmark.extra_info |= {"bytes": case.traffic(name), "flops": case.flops(name), "arm": name}
    benchmark(run)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_no_arm_changes_its_inputs(case):
    data = case.inputs()
    before = {name: x.clone() for name, x in data.items()}
    for name, run in arms.build(case, data).items():
        if "compile" not in name:  # compiling takes most of a minute a case
            run()
            assert all(torch.equal(x, before[key]) for key, x in data.items()), name


def test_a_wrong_answer_gets_no_time():
    case = CASES[0]
    data = case.inputs()
    todo = arms.build(case, data)
    wrong = {"rlfast": lambda: {"logp": todo["rlfast"]()["logp"] * 1.01}}
    _, failures = measure.checked(wrong, case.truth(data), case.gate)
    assert failures["rlfast"].startswith("wrong answer")


def test_targets_name_what_exists():
    for case in suite.CASES:
        little = case.small()
        present = set(arms.build(little, little.inputs()))
        for target in case.targets:
            base = target.arm.removesuffix(" avx2").removesuffix(" baseline")
            assert base in present, (case.name, target)
            over = present | {"plain", "trl", "torchrl"} | set(case.floors(base))
            over = {"speed": over, "cost": over, "memory": set(case.sizes()), "us": {""}}[target.kind]
            assert target.over in over, (case.name, target)


def test_floors_are_made_of_ceilings():
    for case in CASES:
        ceilings = {name.split(" (")[0] for name in case.ceilings(case.inputs(), "cpu")}
        for arm in case.OURS if ceilings else ():
            assert any(parts.keys() <= ceilings for parts in case.floors(arm).values()), (case.name, arm)


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
    lower = {"rlfast avx2": {"ms": 20.0, "rounds": [20.0]}, "eager": {"ms": 80.0, "rounds": [80.0]}}
    result["lower"] = {"arms": lower, "failures": {}}
    found = {o.text: (o.value, o.passed) for o in outcome.outcomes(result)}
    assert found["rlfast avx2: ≥ 3× eager torch"] == (4.0, True), "over the eager of its own loop"


def test_a_target_in_microseconds():
    case = replace(CASES[0], targets=(Target("rlfast", "", 80.0, "us"), Target("rlfast", "", 60.0, "us")))
    result = {"case": asdict(case), "failures": {}, "arms": {"rlfast": {"ms": 0.09, "rounds": [0.09, 0.07, 0.1]}}}
    found = {o.text: o.passed for o in outcome.outcomes(result)}
    assert found == {"rlfast: ≤ 80 µs": True, "rlfast: ≤ 60 µs": False}


def test_a_short_call_is_repeated_within_its_sample():
    calls = []
    samples = measure.interleaved({"short": lambda: calls.append(0)}, 0.0)["short"]
    assert len(samples) < len(calls) and min(samples) < measure.SAMPLE_S / 10


def test_an_older_result_is_read():
    """Its log-prob cases have one shape for both ops, and none of the fields that came later."""
    for case in (CASES[0], CASES[-1]):
        fields = {"width": 0, "entropy": False, "backward": True} | asdict(case)
        older = {name: fields[name] for name in fields if name not in ("isas", "gpu_targets")}
        assert suite.read(older) == replace(case, gpu_targets=())


def test_an_update_replaces_a_case_or_adds_it(tmp_path):
    path, now = tmp_path / "device.json", {"date": "today", "commit": "abc", "uncommitted": False}
    path.write_text(json.dumps({"cases": [{"case": {"name": name}, "old": True} for name in "ab"]}))
    for name, expected in (("a", "ab"), ("c", "abc")):
        result = updated(path, {"case": {"name": name}}, now)
        assert "".join(c["case"]["name"] for c in result["cases"]) == expected
        assert [c["case"]["name"] for c in result["cases"] if "old" not in c] == [name]


def test_a_table_has_a_column_for_each_peer():
    case = CASES[0]
    row = {"ms": 2.0, "rounds": [2.0], "error": 0.0}
    arms_ = {"rlfast": row, "eager": row, "verl": row | {"rounds": [5.0]}, "read": {"ms": 1.0, "rounds": [1.0]}}
    result = {"device": "A CPU", "date": "", "commit": "", "versions": {"torch": ""}, "command": ""}
    result["cases"] = [{"case": asdict(case), "failures": {}, "arms": arms_}]
    head, _, figures = report.figures([result])[-3:]
    cells = dict(zip(head.split(" | "), figures.split(" | "), strict=True))
    assert (cells["× verl"], cells["× eager"], cells["of the ceiling"]) == ("2.50", "1.00", "50%")


def test_overhead_is_measured_where_the_kernels_are():
    found = overhead.measure()
    assert found is None or set(found["above_raw"]) == {"no_grad", "recording"}


def test_inputs_are_seeded():
    for case in CASES:
        first, second = case.inputs(), case.inputs()
        assert all(torch.equal(x, second[name]) for name, x in first.items()), case.name
