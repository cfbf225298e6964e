"""python -m attn_impls compare: what each case's verdict rests on, the exit code, and files that cannot be compared."""

import itertools
import json
import math

import pytest
from fakes import WORKLOAD, saved_case, saved_run

from attn_impls.__main__ import main

OTHER = "b2-h2-s64-d64-causal-bf16"


@pytest.fixture
def compare(tmp_path, capsys):
    """compare(baselines, candidates, *options): the exit code, the verdicts by case, and what was printed."""
    numbers = itertools.count()

    def save(document):
        path = tmp_path / f"{next(numbers)}.json"
        path.write_text(document if isinstance(document, str) else json.dumps(document))
        return str(path)

    def run(baselines, candidates, *options):
        files = [save(document) for document in baselines], [save(document) for document in candidates]
        one = len(files[0]) == len(files[1]) == 1
        arguments = [*files[0], *files[1]] if one else ["--baseline", *files[0], "--candidate", *files[1]]
        code = main(["compare", *options, *arguments])
        out, err = capsys.readouterr()
        words = [line.split() for line in out.splitlines()]
        verdicts = {row[2]: row[0] for row in words if len(row) > 2 and row[0].isupper() and row[1].startswith("b")}
        return code, verdicts, out + err

    return run


def pair(before, after, **more):
    """A run before and after; each case is its arguments, by name."""
    return tuple([saved_run(*(saved_case(name, *values) for name, values in side.items()), **more)] for side in (before, after))


def test_paired_ratio_decides_and_not_the_time(compare):
    """All times doubled with the machine; only "slow" lost against SDPA."""
    before = {"sdpa": (1e-3,), "slow": (2e-3, 0.5), "same": (1e-3, 1.0), "fast": (1e-3, 1.0)}
    after = {"sdpa": (1e-3,), "slow": (2e-3, 0.48), "same": (2e-3, 1.01), "fast": (1e-3, 1.04)}
    code, verdicts, out = compare(*pair(before, after))
    assert (code, verdicts) == (1, {"sdpa": "SAME", "slow": "REGRESSED", "same": "SAME", "fast": "IMPROVED"})
    assert "+4.2 %" in next(line for line in out.splitlines() if " slow " in line)
    assert "1 REGRESSED, 0 INCONCLUSIVE, 0 REMOVED, 0 NEW, 1 IMPROVED, 2 SAME" in out
    assert "1 pair, no interval" in out


@pytest.mark.parametrize(("rate", "verdict"), [(1.0, "INCONCLUSIVE"), (1.1, "REGRESSED")])
def test_one_ratio_is_not_believed_against_the_time_of_a_machine_that_stood_still(compare, rate, verdict):
    """The case became faster, and SDPA in its rounds more so: on a machine that became faster too, the case did not keep up."""
    before, after = saved_case("a", 1e-3, 1.0), saved_case("a", 0.97e-3, 0.95, ceiling=rate)
    code, verdicts, out = compare([saved_run(before)], [saved_run(after)])
    assert (code, verdicts) == (2 if verdict == "INCONCLUSIVE" else 1, {"a": verdict})
    assert ("its own time went the other way (-3.0 %)" in out) == (verdict == "INCONCLUSIVE")


def test_rows_begin_with_what_matters(compare):
    _, verdicts, _ = compare(*pair({"a": (1, 1), "b": (1, 1)}, {"a": (1, 1), "b": (1, 0.5)}))
    assert list(verdicts) == ["b", "a"]


def test_nothing_changed_is_0(compare):
    assert compare(*pair({"a": (1, 1)}, {"a": (1.5, 1)}))[:2] == (0, {"a": "SAME"})


def test_improvement_is_0(compare):
    assert compare(*pair({"a": (1, 1)}, {"a": (1, 2)}))[:2] == (0, {"a": "IMPROVED"})


@pytest.mark.parametrize(("floor", "verdict"), [("3", "REGRESSED"), ("5%", "SAME"), ("4.5", "SAME")])
def test_floor_is_chosen(compare, floor, verdict):
    assert compare(*pair({"a": (1, 1)}, {"a": (1, 0.96)}), "--floor", floor)[1] == {"a": verdict}


def test_without_sdpa_the_time_decides_and_it_is_said(compare):
    code, verdicts, out = compare(*pair({"sdpa": (1e-3,), "capped": (1e-3,)}, {"sdpa": (1e-3,), "capped": (1.1e-3,)}))
    assert (code, verdicts) == (1, {"sdpa": "SAME", "capped": "REGRESSED"})
    assert " time " in next(line for line in out.splitlines() if " capped " in line)


def control(before, after, **changes):
    """One unpaired and one paired case, the fixed matmul at these TFLOP/s."""
    return tuple(
        [saved_run(saved_case("capped", 1e-3 * time, ceiling=rate), saved_case("paired", 1e-3, 1.0, ceiling=rate), **changes)]
        for rate, time in ((before, 1), (after, 1.1))
    )


def test_time_is_not_judged_where_the_machine_moved(compare):
    code, verdicts, out = compare(*control(100, 91))
    assert (code, verdicts) == (2, {"capped": "INCONCLUSIVE", "paired": "SAME"})
    assert "the machine moved: its control +9.9 %" in out


def test_time_is_judged_where_the_control_stood_still(compare):
    assert compare(*control(100, 99))[:2] == (1, {"capped": "REGRESSED", "paired": "SAME"})


@pytest.mark.parametrize("what", ["torch", "cuda", "cudnn", "driver"])
def test_a_new_sdpa_is_no_yardstick(compare, what):
    """Another torch's SDPA is 10 % faster: what did not change would look slower against it."""
    old, new = [saved_run(saved_case("same", 1, 1.0))], [saved_run(saved_case("same", 1, 0.9), **{what: "9.9"})]
    code, verdicts, out = compare(old, new)
    assert (code, verdicts) == (0, {"same": "SAME"})
    assert f"SDPA may differ ({what} " in out


def test_a_new_sdpa_does_not_hide_a_regression(compare):
    """All became 10 % slower with another torch, SDPA too."""
    old, new = [saved_run(saved_case("slow", 1, 1.0))], [saved_run(saved_case("slow", 1.1, 1.0), torch="9.9")]
    assert compare(old, new)[:2] == (1, {"slow": "REGRESSED"})


def several(ratios, times=None, sdpa=(1.0, 1.0, 1.0), **more):
    """Pairs of runs: `one`, whose vs_sdpa is divided by the ratio in each candidate; its time and SDPA's are multiplied."""
    times = times or [ratio * base for ratio, base in zip(ratios, sdpa, strict=True)]
    before = [saved_run(saved_case("sdpa", 1), saved_case("one", 1, 1.0)) for _ in ratios]
    after = [
        saved_run(saved_case("sdpa", base), saved_case("one", time, 1 / ratio, **more))
        for ratio, time, base in zip(ratios, times, sdpa, strict=True)
    ]
    return before, after


@pytest.mark.parametrize(
    ("ratios", "code", "verdict"),
    [
        ([1.05, 1.051, 1.049], 1, "REGRESSED"),
        ([1.05, 1.05, 0.95], 0, "INCONCLUSIVE"),
        ([1.001, 1, 1], 0, "SAME"),
        ([0.9, 0.901, 0.899], 0, "IMPROVED"),
    ],
)
def test_three_pairs_give_intervals(compare, ratios, code, verdict):
    found = compare(*several(ratios))
    assert found[0] == code
    assert found[1]["one"] == verdict
    assert "change [99 % bounds]" in found[2]


def test_sdpa_that_changed_is_found_in_the_pairs(compare):
    """Same versions, but SDPA became 10 % slower: `one` is the same, and would look faster."""
    runs = several([1 / 1.1] * 3, times=[1, 1.001, 0.999], sdpa=(1.1, 1.101, 1.099))
    code, verdicts, out = compare(*runs)
    assert (code, verdicts) == (1, {"sdpa": "REGRESSED", "one": "SAME"})
    assert "SDPA itself +10.0 %" in out


def test_sdpa_that_changed_hides_nothing_where_it_is_not_a_case(compare):
    runs = several([1.0, 1.0, 1.0], times=[1.1, 1.101, 1.099], sdpa=(1.1, 1.101, 1.099))
    for run in (*runs[0], *runs[1]):
        del run["benchmarks"][0]
    assert compare(*runs)[:2] == (1, {"one": "REGRESSED"})


def test_noise_of_sdpa_is_no_change_of_it(compare):
    code, verdicts, _ = compare(*several([1.0, 1.001, 0.999], sdpa=(1.3, 0.8, 1.1)))
    assert (code, verdicts["one"]) == (0, "SAME")


def test_a_throttled_case_is_not_told(compare):
    before, after = [saved_run(saved_case("a", 1, 1.0))], [saved_run(saved_case("a", 1, 0.5, throttled=True))]
    code, verdicts, out = compare(before, after)
    assert (code, verdicts) == (2, {"a": "INCONCLUSIVE"})
    assert "throttled in 1 of 1 pairs" in out


def test_several_pairs_count_a_throttled_ratio_to_sdpa_but_no_throttled_time(compare):
    before, after = several([1.0, 1.001, 0.999])
    for case in after[1]["benchmarks"]:
        case["extra_info"]["sm_clock_unsteady"] = True
    code, verdicts, out = compare(before, after)
    assert (code, verdicts) == (2, {"sdpa": "INCONCLUSIVE", "one": "SAME"})
    assert "throttled in 1 of 3 pairs" in out


def test_missing_cases_are_2_and_new_ones_are_not(compare):
    one, two = {"a": (1, 1)}, {"a": (1, 1), "b": (1, 1)}
    assert compare(*pair(two, one))[:2] == (2, {"a": "SAME", "b": "REMOVED"})
    assert compare(*pair(one, two))[:2] == (0, {"a": "SAME", "b": "NEW"})


def test_a_case_missing_from_some_runs_is_not_told(compare):
    before, after = several([1.0, 1.0, 1.0])
    del after[2]["benchmarks"][1]
    code, verdicts, out = compare(before, after)
    assert (code, verdicts["one"]) == (2, "INCONCLUSIVE")
    assert "missing from 1 of 6 runs" in out


def test_a_regression_outweighs_what_is_not_told(compare):
    assert compare(*pair({"a": (1, 1), "b": (1, 1)}, {"a": (1, 0.5)}))[0] == 1


def test_cases_are_told_apart_by_direction(compare):
    cases = [saved_case("a", 1, 1.0, direction=direction) for direction in ("forward", "backward")]
    slower = [saved_case("a", 1, ratio, direction=d) for d, ratio in (("forward", 1.0), ("backward", 0.5))]
    code, _, out = compare([saved_run(*cases)], [saved_run(*slower)])
    assert code == 1
    assert "1 REGRESSED" in out
    assert "a (backward)" in next(line for line in out.splitlines() if line.startswith("REGRESSED"))


def test_older_files_have_no_direction(compare):
    case = saved_case("a", 1, 1.0)
    del case["extra_info"]["direction"]
    assert compare([saved_run(case)], [saved_run(saved_case("a", 1, 1.0))])[:2] == (0, {"a": "SAME"})


def distributed(makespan, speedup, ranks=2, **how):
    place = {"strategy": "tensor", "form": "gather", "world_size": ranks, "speedup": speedup} | how
    return [saved_run(saved_case("a", makespan, ceiling=None, **place))]


@pytest.mark.parametrize(
    ("makespan", "speedup", "code", "verdict"),
    [
        (1.0, 1.8, 0, "SAME"),
        (1.1, 1.8 / 1.1, 1, "REGRESSED"),
        (0.9, 1.8 / 0.9, 0, "IMPROVED"),
        (1.1, 1.8, 2, "INCONCLUSIVE"),  # one rank became slower as well
        (1.0, 1.6, 0, "SAME"),  # one rank became faster
        (1.1, None, 1, "REGRESSED"),
    ],
)
def test_distributed_cases_are_judged_by_their_makespan(compare, makespan, speedup, code, verdict):
    found = compare(distributed(1.0, 1.8), distributed(makespan, speedup))
    assert found[:2] == (code, {"a": verdict})
    assert " makespan " in found[2]


def test_distributed_cases_of_several_pairs_need_no_speedup(compare):
    before = [distributed(1.0, 1.8)[0] for _ in range(3)]
    after = [distributed(makespan, 1.8)[0] for makespan in (1.1, 1.101, 1.099)]
    assert compare(before, after)[:2] == (1, {"a": "REGRESSED"})


def test_cases_made_with_other_options_are_not_told(compare):
    code, verdicts, out = compare(distributed(1.0, 1.8, overlap_streams=[1, 1]), distributed(1.0, 1.8, overlap_streams=[2, 2]))
    assert (code, verdicts) == (2, {"a": "INCONCLUSIVE"})
    assert "made with overlap_streams [1, 1], now [2, 2]" in out
    assert compare(distributed(1.0, 1.8), distributed(1.0, 1.8, overlap_streams=[2, 2]))[0] == 0  # older files do not say


def test_other_numbers_of_ranks_are_other_cases(compare):
    code, _, out = compare(distributed(1.0, 1.8), distributed(1.0, 1.8, ranks=4))
    assert code == 2
    assert "1 REMOVED, 1 NEW" in out


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({"gpu": "NVIDIA H200"}, "NVIDIA H200"),
        ({"cpu": {"brand_raw": "Abacus 3000"}}, "Abacus 3000"),
        ({"threads": 8}, "8 torch threads"),
    ],
)
def test_another_machine_is_2_and_one_line(compare, machine, said):
    code, verdicts, out = compare([saved_run(saved_case("a"))], [saved_run(saved_case("a"), **machine)])
    assert (code, verdicts) == (2, {})
    assert len(out.splitlines()) == 1
    assert said in out


@pytest.mark.parametrize(
    "document",
    ["", "{", "[]", "3", "{}", saved_run(), saved_run({"extra_info": {}}), saved_run({"extra_info": {"workload": WORKLOAD}}),
     saved_run(saved_case("a", 0)), saved_run(saved_case("a", None)), saved_run(saved_case("a", 1, -1)),
     saved_run(saved_case("a", math.nan)), saved_run(saved_case("a", "fast")), saved_run(saved_case("a")) | {"machine_info": []}],
)  # fmt: skip
def test_a_file_that_is_something_else_is_2_and_one_line(compare, document):
    code, _, out = compare([document], [saved_run(saved_case("a"))])
    assert code == 2
    assert len(out.splitlines()) == 1
    assert "0.json" in out


@pytest.mark.parametrize(
    "arguments",
    [[], ["a.json"], ["a.json", "b.json", "c.json"], ["--baseline", "a.json"], ["--candidate", "a.json"],
     ["--baseline", "a.json", "b.json", "--candidate", "c.json"], ["a.json", "--baseline", "b.json", "--candidate", "c.json"]],
)  # fmt: skip
def test_files_that_are_no_pairs_are_2_and_one_line(capsys, arguments):
    assert main(["compare", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("floor", ["0", "-3", "100", "x", "nan"])
def test_a_floor_that_is_none_is_refused(capsys, floor):
    with pytest.raises(SystemExit) as ended:
        main(["compare", f"--floor={floor}", "a.json", "b.json"])
    assert ended.value.code == 2
    assert "--floor" in capsys.readouterr().err


def test_markdown_shows_what_changed_and_folds_the_rest(compare):
    before = {"sdpa": (1e-3,), "slow<|>": (1e-3, 1.0), "same": (1e-3, 1.0)}
    after = {"sdpa": (1e-3,), "slow<|>": (1e-3, 0.5), "same": (1e-3, 1.0)}
    code, _, out = compare(*pair(before, after), "--markdown")
    assert code == 1
    loud, _, folded = out.partition("<details><summary>2 SAME</summary>")
    assert loud.startswith("**1 REGRESSED")
    assert f"| REGRESSED | {WORKLOAD} | slow&lt;&#124;> | 1 ms | 1 ms | +100.0 % | vs sdpa | 1 |" in loud
    assert "| SAME |" not in loud
    assert folded.count("| SAME |") == 2
    assert all(line.count("|") == 10 for line in out.splitlines() if line.startswith("|"))
