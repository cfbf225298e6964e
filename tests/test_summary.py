"""The table, from benchmarks as a JSON file holds them."""

import re

import pytest

from attn_impls.harness.summary import render

SEED = "b1-h32-s8192-d128-bf16"
DECODE = "b64-h32kv8-q1kv8192-d128-causal-bf16"
SMALL = "b8-h16-s512-d64-bf16"
GPU_LINES = ["NVIDIA H200 · driver 575.57 · CUDA 12.9 · cuDNN 91300", "torch 2.11.0 · triton 3.6.0"]


def saved(implementation, seconds, workload=SEED, /, **info):
    """A benchmark measured on an H200, with a tenth of a percent of IQR."""
    limit, bound = {SEED: (1.1112e-3, "compute"), DECODE: (4.4761e-4, "memory"), SMALL: (1.747e-5, "memory")}[workload]
    return {
        "stats": {"median": seconds, "iqr": seconds / 1000},
        "extra_info": {
            "implementation": implementation,
            "workload": workload,
            "label": "",
            "timer": "device",
            "tflops": 1.0995 / seconds,
            "tb_per_s": 2.1485e-3 / seconds,
            "limit_s": limit,
            "limit_bound": bound,
            "limit_source": "datasheet",
            "percent_of_limit": 100 * limit / seconds,
            "ceiling_tflops": 788.4,
            "ceiling_tb_per_s": 4.31,
            "datasheet_tflops": 989.5,
            "datasheet_tb_per_s": 4.8,
            "error_over_budget": 0.31,
            "vs_sdpa": 1.619e-3 / seconds,
            "vs_sdpa_ci_low": 1.6e-3 / seconds,
            "vs_sdpa_ci_high": 1.64e-3 / seconds,
            "host_us": 41.7,
            "peak_bytes": 64 << 20,
            "kernels": ["void flash::flash_fwd_kernel<Traits>(Params)"],
            "host_bound": False,
            "sm_clock_unsteady": False,
            "approximate": False,
            "sm_mhz_median": 1905.0,
        }
        | info,
    }


def saved_on_cpu(implementation, seconds, /, **info):
    nothing = dict.fromkeys(("datasheet_tflops", "datasheet_tb_per_s", "peak_bytes", "sm_mhz_median"))
    return saved(implementation, seconds, **nothing | {"timer": "host", "limit_source": "measured"} | info)


def texts(benchmarks, not_run=None, machine=(), width=160):
    return [line.text for line in render(benchmarks, not_run or {}, machine, width)]


def tables(lines):
    """The cells of every indented line; columns are two blanks apart."""
    return [re.split(r"\s{2,}", line.strip()) for line in lines if line.startswith("  ") and line[2] != " "]


FOUR = [
    saved("sdpa", 1.619e-3, chosen="cudnn", vs_sdpa=1.0, kernels=["cudnn_generated_fort_native_sdpa_sm90", "Memset (Device)"]),
    saved("handcrafted", 2.034e-2, kernels=["nvjet_tst", "softmax", "nvjet_tst_2"], peak_bytes=8256 << 20, error_over_budget=1.0),
    saved("flash_attn3", 1.482e-3, kernels=["void cutlass::device_kernel<flash::FlashAttnFwdSm90<x>>(y)"], host_bound=True),
    saved("sage", 9.53e-4, approximate="int8", sm_clock_unsteady=True, sm_mhz_median=1755.0, kernels=[]),
]
NOT_RUN = {
    (SEED, "xformers"): "xformers: not installed: pip install xformers",
    (SEED, "flash_attn4"): "FAILED: differs from SDPA",
}
GOLDEN = """\
NVIDIA H200 · driver 575.57 · CUDA 12.9 · cuDNN 91300
torch 2.11.0 · triton 3.6.0

b1-h32-s8192-d128-bf16   full · 1.10 TFLOP · limit 1.11 ms (bf16 matmul ceiling 788 TFLOP/s here, 989.5 datasheet)
  implementation  device ms    IQR  TFLOP/s  % limit      vs sdpa [95 % CI]  host µs  peak MiB   error  kernel
  sage ~ ≈            0.953  0.1 %     1154    117 %     1.70× [1.68, 1.72]       42        64  ✓ 0.31  –
  flash_attn3 !        1.48  0.1 %    741.9     75 %     1.09× [1.08, 1.11]       42        64  ✓ 0.31  FlashAttnFwdSm90
  sdpa → cudnn         1.62  0.1 %    679.1     69 %               baseline       42        64  ✓ 0.31  cudnn_generated_fort_native_sdpa_sm90 +1
  handcrafted          20.3  0.1 %     54.1      5 %  0.080× [0.079, 0.081]       42      8256  ✓ 1.00  nvjet_tst +2
  flash_attn4  FAILED: differs from SDPA
  xformers     not installed: pip install xformers

error: worst row against float64, as a share of what its dtype excuses (✓ up to 1)
→ the kernel that a dispatching library chose
! the call waits for the device: its time includes the host's
~ the SM clock fell below 95 % of its median in some rounds
≈ approximate kernel (int8), by its own account: its error is a share of what that arithmetic excuses
SM clock while timing: median 1905 MHz, lowest case 1755 MHz
"""  # noqa: E501


def test_the_whole_summary():
    assert "\n".join(texts(FOUR, NOT_RUN, GPU_LINES)) + "\n" == GOLDEN


def test_colours_tell_the_fastest_and_the_failed():
    styles = {line.text.split()[0]: line.style for line in render(FOUR, NOT_RUN, [], 160) if line.text.startswith("  ")}
    assert styles["implementation"] == {"cyan": True}
    assert styles["sage"] == {"green": True}
    assert styles["flash_attn3"] == styles["handcrafted"] == {}
    assert styles["flash_attn4"] == {"red": True}
    assert styles["xformers"] == {"yellow": True}


@pytest.mark.parametrize("width", [80, 100, 160])
def test_everything_asked_for_is_in_the_table_fastest_first(width):
    rows = tables(texts(FOUR, NOT_RUN, width=width))
    assert [row[0] for row in rows[1:5]] == ["sage ~ ≈", "flash_attn3 !", "sdpa → cudnn", "handcrafted"]
    assert [row[1] for row in rows[:5]] == ["device ms", "0.953", "1.48", "1.62", "20.3"]
    assert [row[0] for row in rows[5:]] == ["flash_attn4", "xformers"]


@pytest.mark.parametrize("width", [80, 100, 160])
@pytest.mark.parametrize(
    "benchmarks", [FOUR, [saved_on_cpu("sdpa", 1.0), saved_on_cpu("handcrafted", 123.4)]], ids=["gpu", "cpu"]
)
def test_no_line_of_a_table_is_longer_than_the_terminal(width, benchmarks):
    reasons = {(SEED, name): f"{name}: not installed: {'pip install it, ' * 20}" for name in ("xformers", "flex")}
    lines = [line for line in texts(benchmarks, reasons, width=width) if line.startswith("  ") and line[2] != " "]
    assert len(lines) == 1 + len(benchmarks) + 2
    assert max(map(len, lines)) <= width
    assert len({len(line) for line in lines[1 + len(benchmarks) :]}) == 1  # both reasons were cut at the edge


RANKS = [
    {"implementation", "device ms"},
    {"TFLOP/s", "% limit", "error"},
    {"vs sdpa [95 % CI]"},
    {"IQR"},
    {"host µs"},
    {"peak MiB"},
    {"kernel"},
]


def test_columns_go_by_rank_and_never_the_implementation_or_the_time():
    seen = []
    for width in range(30, 200):
        lines = texts(FOUR, width=width)
        columns = set(tables(lines)[0])
        rank = max(n for n in range(len(RANKS)) if RANKS[n] <= columns)
        assert columns == set().union(*RANKS[: rank + 1])
        assert max(len(line) for line in lines if line.startswith("  ") and line[2] != " ") <= width
        seen.append(rank)
    assert seen == sorted(seen)
    assert set(seen) == set(range(len(RANKS)))  # each of them alone


def test_memory_bound_rows_have_both_rates_and_a_narrow_terminal_keeps_bytes():
    four = [saved(b["extra_info"]["implementation"], b["stats"]["median"], DECODE) for b in FOUR]
    seen = {width: tables(texts(four, width=width))[0] for width in range(30, 200)}
    assert all("GB/s" in columns for columns in seen.values() if "TFLOP/s" in columns or "% limit" in columns)
    assert ("GB/s" in seen[80], "TFLOP/s" in seen[80], "vs sdpa [95 % CI]" in seen[80]) == (True, False, True)
    assert seen[88][2:4] == ["TFLOP/s", "GB/s"]  # and not the IQR, which is the next to have room
    assert seen[100][2:5] == ["IQR", "TFLOP/s", "GB/s"]
    assert not any("GB/s" in tables(texts(FOUR, width=width))[0] for width in range(30, 200))


def test_a_column_stays_as_long_as_it_fits():
    lines = texts(FOUR, width=200)
    before_kernel = lines[2].index("  kernel")
    assert "peak MiB" in "\n".join(texts(FOUR, width=before_kernel))
    assert "peak MiB" not in "\n".join(texts(FOUR, width=before_kernel - 1))


@pytest.mark.parametrize(
    ("row", "titles", "cells"),
    [
        (saved("a", 1.111e-3), ["device ms", "TFLOP/s"], ["1.11", "989.6", "100 %"]),
        (saved("a", 4.6e-4, DECODE, tflops=18.67), ["device ms", "TFLOP/s", "GB/s"], ["0.46", "18.7", "4671", "97 %"]),
        (saved("a", 3.21e-5, SMALL), ["device µs", "TFLOP/s", "GB/s"], ["32.1", "54 %"]),
        (saved_on_cpu("a", 1.234), ["wall ms", "TFLOP/s"], ["1234", "0.891", "0.09 %"]),
        (saved_on_cpu("a", 9.9e-5), ["wall µs", "TFLOP/s"], ["99"]),
    ],
)
def test_units(row, titles, cells):
    title, found = tables(texts([row]))[:2]
    assert set(titles) <= set(title)
    assert set(cells) <= set(found)
    assert len(title) == len(found)


def test_a_cpu_run_has_no_device_columns():
    lines = texts([saved_on_cpu("a", 1.0)])
    assert tables(lines)[0] == ["implementation", "wall ms", "IQR", "TFLOP/s", "% limit", "vs sdpa [95 % CI]", "error", "kernel"]
    assert "datasheet" not in lines[1]
    assert "SM clock" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ({"vs_sdpa": 1.5, "vs_sdpa_ci_low": 1.4, "vs_sdpa_ci_high": 1.651}, "1.50× [1.40, 1.65]"),
        ({"vs_sdpa": None, "vs_sdpa_ci_low": None, "vs_sdpa_ci_high": None}, "–"),
        ({"implementation": "sdpa"}, "baseline"),
        ({"implementation": "sdpa-flash"}, "1.62× [1.60, 1.64]"),
    ],
)
def test_comparison_with_sdpa(info, text):
    title, row = tables(texts([saved("a", 1e-3, **info)]))[:2]
    assert row[title.index("vs sdpa [95 % CI]")] == text


@pytest.mark.parametrize(
    ("key", "name", "legend"),
    [
        ("host_bound", "a !", "! the call waits for the device"),
        ("sm_clock_unsteady", "a ~", "~ the SM clock fell"),
        ("approximate", "a ≈", "≈ approximate kernel"),
        ("chosen", "a → flash", "→ the kernel that a dispatching library chose"),
    ],
)
def test_a_mark_is_explained_where_it_is_used_only(key, name, legend):
    value = "flash" if key == "chosen" else True
    with_mark, without = texts([saved("a", 1e-3, **{key: value})]), texts([saved("a", 1e-3)])
    assert tables(with_mark)[1][0] == name
    assert tables(without)[1][0] == "a"
    assert [line for line in with_mark if line.startswith(legend)]
    assert not [line for line in without if line.startswith(legend)]


@pytest.mark.parametrize(
    ("kernels", "text"),
    [
        (["void flash::flash_fwd_splitkv_kernel<T>(P)"], "flash_fwd_splitkv_kernel"),
        (["void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float>(f*)", "b"], "cunn_SoftMaxForward +1"),
        (["fmha_cutlassF_bf16_aligned_64x64_rf_sm80(P)"], "fmha_cutlassF_bf16_aligned_64x64_rf_sm80"),
        (["aten::bmm", "aten::mul", "aten::_softmax"], "bmm +2"),
        (["k" * 500], "k" * 39 + "…"),
        (["<>", ""], "<> +1"),
        ([], "–"),
        (None, "–"),
    ],
)
def test_kernel_names_are_short(kernels, text):
    assert tables(texts([saved("a", 1e-3, kernels=kernels)]))[1][-1] == text


@pytest.mark.parametrize(
    ("identity", "label", "text"),
    [
        (SEED, "", "full · 1.10 TFLOP"),
        (DECODE, "llama3-8b-decode", "llama3-8b-decode · causal · 8.59 GFLOP"),
        ("b1-h16kv8-s8192-d256-causal-win4096-cap50-bf16", "", "causal, window 4096 · 412.35 GFLOP"),
        ("b1-h1-s1-d8-fp32", "", "full · 32 FLOP"),
    ],
)
def test_a_group_says_what_is_computed(identity, label, text):
    benchmark = saved("a", 1e-3)
    benchmark["extra_info"] |= {"workload": identity, "label": label}
    assert texts([benchmark])[1].startswith(f"{identity}   {text} · limit ")


def test_groups_keep_the_order_of_the_run():
    benchmarks = [saved("a", 1e-3, DECODE), saved("a", 1e-3), saved("b", 5e-4, DECODE)]
    lines = texts(benchmarks, {(SMALL, "a"): "unsupported"})
    assert [line.split()[0] for line in lines if line.startswith("b")] == [DECODE, SEED, SMALL]
    assert [row[0] for row in tables(lines)] == ["implementation", "b", "a", "implementation", "a", "a"]


def test_what_never_ran_for_one_reason_is_said_once():
    not_run = {(w, "xformers"): "not installed: pip install xformers" for w in (SEED, DECODE)}
    not_run |= {(SEED, "flex"): "flex: no window", (DECODE, "flex"): "flex: no decode"}  # for two reasons
    not_run |= {(SEED, "cudnn"): "head dim 512"}  # ran elsewhere
    not_run |= {(w, "mine"): "FAILED: boom" for w in (SEED, DECODE)}
    lines = texts([saved("sdpa", 1e-3), saved("sdpa", 1e-3, DECODE), saved("cudnn", 1e-3, DECODE)], not_run)
    first, second, last = (
        next(n for n, line in enumerate(lines) if line.startswith(t)) for t in (SEED, DECODE, "did not run at all")
    )
    assert first < second < last
    assert lines[first + 3 : first + 5] == ["  cudnn  head dim 512", "  flex   no window"]
    assert lines[second + 4] == "  flex  no decode"
    assert lines[last + 1 : last + 3] == ["  mine      FAILED: boom", "  xformers  not installed: pip install xformers"]
    assert sum("xformers" in line for line in lines) == 1
    styles = {line.text: line.style for line in render([saved("sdpa", 1e-3)], not_run, [], 160)}
    assert styles["  mine      FAILED: boom"] == {"red": True}


def test_of_a_single_workload_the_reasons_stand_with_it():
    lines = texts([saved("sdpa", 1e-3)], {(SEED, "xformers"): "not installed"})
    assert "did not run at all" not in lines
    assert lines[4] == "  xformers  not installed"


def test_a_run_without_results_gives_its_reasons():
    assert texts([], {(SEED, "a"): "a: unsupported", (SEED, "bb"): "FAILED: boom"}, ["machine"]) == [
        "machine",
        "",
        SEED,
        "  a   unsupported",
        "  bb  FAILED: boom",
    ]
    assert texts([]) == []


OPTIONAL = sorted(set(saved("a", 1.0)["extra_info"]) - {"implementation", "workload"})


@pytest.mark.parametrize("key", OPTIONAL)
@pytest.mark.parametrize("make", [saved, saved_on_cpu])
def test_a_field_that_is_missing_costs_its_cell_only(key, make):
    """Files of other versions of this suite are shown too."""
    without, empty, whole = make("without", 1e-3), make("empty", 2e-3, **{key: None}), make("whole", 3e-3)
    del without["extra_info"][key]
    for benchmarks in ([without], [empty], [without, empty, whole]):
        names = [row[0] for row in tables(texts(benchmarks))[1:]]
        assert names == [benchmark["extra_info"]["implementation"] for benchmark in benchmarks]


@pytest.mark.parametrize("width", [20, 80, 160])
@pytest.mark.parametrize(
    "info", [{"implementation": "x" * 300}, {"chosen": "y" * 300}, {"implementation": "→✓" * 90, "kernels": [""]}]
)
def test_hostile_names_are_cut_at_the_edge(info, width):
    lines = [
        line
        for line in texts([saved("a", 1e-3, **info), saved("b", 2e-3)], width=width)
        if line.startswith("  ") and line[2] != " "
    ]
    assert len(lines) == 3
    assert max(map(len, lines)) <= width


@pytest.mark.parametrize("width", [80, 160])
def test_one_long_name_does_not_take_everybody_s_time_away(width):
    lines = texts([saved("a", 1.11e-3), saved("x" * 300, 2.22e-3)], width=width)
    head, first, second = (line for line in lines if line.startswith("  ") and line[2] != " ")
    assert "device ms" in head
    assert "1.11" in first
    assert "2.22" in second


def test_a_reason_of_several_lines_stays_one_line():
    lines = texts([saved("sdpa", 1e-3)], {(SEED, "mine"): "mine: no window\nsee https://example.org"})
    assert all(len(line.splitlines()) <= 1 for line in lines)
    assert "  mine  no window" in "\n".join(lines)


def test_what_implementations_answered_is_told_by_answer():
    rows = [
        saved("one", 1e-3, probes="9 ok"),
        saved("two", 2e-3, probes="1 ok, 8 not asked"),
        saved("three", 3e-3, probes="9 ok"),
    ]
    text = " ".join(line.strip() for line in texts(rows, width=80))
    assert "and company: one, three: 9 ok; two: 1 ok, 8 not asked" in text
    assert "and company" not in " ".join(texts([saved("one", 1e-3)]))


@pytest.mark.parametrize(("beside", "said"), [(1.66e-3, False), (1.58e-3, False), (1.70e-3, True), (1.5e-3, True)])
def test_an_sdpa_that_is_another_beside_the_others_is_told(beside, said):
    rows = [saved("sdpa", 1.62e-3, vs_sdpa=1.0), saved("one", 2e-3, sdpa_s=beside), saved("two", 3e-3, sdpa_s=beside)]
    told = [line for line in texts(rows) if "beside the others" in line]
    shown = f"{1e3 * beside:.3g}"
    assert told == [f"  sdpa took {shown} ms beside the others, to which they are compared, and 1.62 alone"] * said


def test_on_a_cpu_it_is_told_where_it_is_much():
    def rows(beside):
        return [saved_on_cpu("sdpa", 1e-3, vs_sdpa=1.0), saved_on_cpu("one", 2e-3, sdpa_s=beside)]

    assert ["beside the others" in " ".join(texts(rows(beside))) for beside in (1.05e-3, 1.5e-3, 0.8e-3)] == [False, True, True]
