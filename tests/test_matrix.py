"""The table of a distributed run: its rows, and why its other cells are empty."""

from attn_impls.harness import matrix

W = "b1-h8-s64-d32-bf16"


def result(form, implementation, median, **info):
    facts = {
        "workload": W,
        "direction": "forward",
        "label": "",
        "form": form,
        "implementation": implementation,
        "imbalance": 1.0125,
        "slowest_rank": 1,
    }
    ratio = {"speedup": 1.9, "speedup_ci_low": 1.8, "speedup_ci_high": 2.0, "efficiency": 0.95, "error_over_budget": 0.25}
    return {"stats": {"median": median}, "extra_info": facts | ratio | {"exposed_s": 1e-3} | info}


def text(results, not_run=None, width=200):
    return [line.text for line in matrix.render(results, not_run or {}, ["machine"], width)]


def test_forms_in_their_order_and_implementations_fastest_first():
    results = [result("core", "b", 2e-3), result("core", "a", 1e-3), result("gather", "b", 4e-3), result("gather", "a", 5e-3)]
    rows = [line.split()[:2] for line in text(results) if line.startswith(("  core", "  gather"))]
    assert rows == [["core", "a"], ["core", "b"], ["gather", "b"], ["gather", "a"]]


def test_a_row_says_all_that_was_measured():
    lines = text([result("gather", "a", 2e-3, percent_of_bound=83.2, probe_bus_gb_per_s=231.0)])
    row = next(line for line in lines if " a " in line)
    for cell in ("2", "1.90× [1.80, 2.00]", "95.0 %", "1", "83 %", "1.012 (rank 1)", "231", "✓ 0.25"):
        assert cell in row, cell


def test_a_doubtful_row_is_marked_as_one_gpu_s_is():
    results = [result("core", "a", 1e-3, host_bound=True, sm_clock_unsteady=True), result("core", "b", 2e-3, approximate="int8")]
    lines = text([*results, result("core", "c", 3e-3)])
    assert [line[:18].split()[1:] for line in lines if line.startswith("  core")] == [["a", "!", "~"], ["b", "≈"], ["c"]]
    assert {line[0] for line in lines if line[1:2] == " " and line[0] != " "} == {"!", "~", "≈"}
    assert not any(line.startswith(("!", "~", "≈")) for line in text([result("core", "c", 3e-3)]))


def test_padded_heads_show_the_bound_that_remains():
    lines = text([result("core", "a", 1e-3, padding_bound=0.75), result("core", "b", 2e-3, padding_bound=1.0)], width=80)
    title, padded, even = (line for line in lines if line.startswith(("  form", "  core")))
    assert "padding" in title
    assert "≤ 75.0 %" in padded
    assert "≤" not in even
    assert any(line.startswith("padding: ") for line in lines)
    assert "padding" not in "".join(text([result("core", "b", 2e-3, padding_bound=1.0)]))


def test_each_direction_has_its_table():
    results = [result("core", "a", 1e-3), result("core", "a", 3e-3, direction="backward")]
    lines = text(results, {(W, "backward", "gather", "b"): "b: forward only"})
    titles = [n for n, line in enumerate(lines) if line.startswith(W)]
    assert [lines[n] for n in titles] == [f"{W}   forward", f"{W}   backward"]
    forward, backward = lines[titles[0] : titles[1]], lines[titles[1] :]
    assert any(line.split()[:3] == ["core", "a", "1"] for line in forward)
    assert any(line.split()[:3] == ["core", "a", "3"] for line in backward)
    assert "  gather × b: forward only" in backward
    assert not any("forward only" in line for line in forward)


def test_without_one_rank_s_time_there_is_no_ratio():
    row = next(line for line in text([result("core", "a", 2e-3, speedup=None, efficiency=None)]) if " a " in line)
    assert row.count("–") >= 2


def test_a_reason_that_all_forms_share_stands_once():
    not_run = {(W, "forward", form, "absent"): "absent: not installed" for form in ("core", "gather")}
    not_run[W, "forward", "gather", "a"] = "a: q_len is odd"
    not_run[W, "forward", "core", "b"] = "FAILED: b differs from the oracle"
    lines = text([result("core", "a", 1e-3)], not_run)
    assert [line for line in lines if "absent" in line] == ["  absent: not installed"]
    assert "  gather × a: q_len is odd" in lines
    assert any(line.startswith("  core × b: FAILED: b differs") for line in lines)
    red = [line.text for line in matrix.render([], not_run, [], 200) if line.style.get("red")]
    assert red == ["  core × b: FAILED: b differs from the oracle"]


def test_no_line_is_longer_than_the_screen():
    not_run = {(W, "forward", "gather", "a"): "a: " + "a long reason " * 20}
    assert max(map(len, text([result("core", "a", 1e-3)], not_run, 80))) <= 80


def test_the_ranks_in_words():
    info = {"world_size": 2, "backend": "nccl", "nccl": "2.28.9", "topology": "2 GPUs a node"}
    assert matrix.describe(info) == "2 ranks · nccl 2.28.9 · 2 GPUs a node"
    assert matrix.describe(info | {"backend": "gloo", "nccl": None}) == "2 ranks · gloo · 2 GPUs a node"
