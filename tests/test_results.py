"""What a run leaves behind, end to end: its JSON, comparisons with saved runs, and its last screen."""

import dataclasses
import json
import re
import socket

import pytest

from attn_impls import Workload
from attn_impls.presets import CPU_RULE

ID, SMALL = "b1-h2kv1-q24kv32-d16v8-causal-fp32", "b2-h4-s32-d64-bf16"
QUICK = ("--rounds", "8", "--warmup-rounds", "1", "--benchmark-only")
MINE = """
import torch
from attn_impls import attention, Unsupported

@attention("mine", dist="pytest", layout="bshd", approximate="int8")
def mine(w):
    def kernel(q, k, v):
        k, v = (t.repeat_interleave(w.group, 2) for t in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * w.scale
        if w.causal:
            scores = scores.masked_fill(~w.mask("cpu"), float("-inf"))
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.float()).to(q.dtype)
    return kernel

@attention("zeros")
def zeros(w):
    return lambda q, k, v: q * 0

@attention("unable")
def unable(w):
    raise Unsupported("not today")

@attention("absent", dist="no-such-dist", install="pip install no-such-dist")
def absent(w): ...
"""
RUN = ("--workload", f"{ID},small", "--impl", "sdpa,handcrafted,mine.py", *QUICK, "--benchmark-storage=store")
GOOD = ("-k", "sdpa or handcrafted or mine")

FIELDS = {
    *("implementation", "library", "library_version", "workload", "direction", "device", "flops", "bytes", "tflops", "limit_s"),
    *("percent_of_limit", "vs_sdpa", "vs_sdpa_ci_low", "vs_sdpa_ci_high", "host_us", "build_s", "peak_bytes", "kernels"),
    *("error_over_budget", "sm_mhz_median", "sm_mhz_p5", "overhead_us", "host_bound", "cold_l2"),
    *(field.name for field in dataclasses.fields(Workload)),
}


@pytest.fixture(scope="module")
def saved(run_suite, suite_copy):
    """A run with its results in run.json and in the storage."""
    return run_suite(*RUN, *GOOD, "--benchmark-json=run.json", "--benchmark-save=first", cwd=suite_copy({"mine.py": MINE}))


def stored(run):
    return sorted((run.cwd / "store").rglob("*.json"))


def names(run):
    return [name.removeprefix(f"{identity}-") for name in run.results for identity in (ID, SMALL) if name.startswith(identity)]


def test_json_holds_every_case_under_its_id(saved):
    assert saved.code == 0, saved.out + saved.err
    assert names(saved) == 2 * ["sdpa", "handcrafted", "mine"]
    for name, result in saved.results.items():
        assert result["name"] == f"test_forward[{name}]"
        assert result["group"] == result["extra_info"]["workload"] in (ID, SMALL)
        assert result["stats"]["rounds"] == len(result["stats"]["data"]) == 8


def test_extra_info_is_complete_and_flat(saved):
    for result in saved.results.values():
        info = result["extra_info"]
        assert info.keys() >= FIELDS
        assert all(isinstance(value, (str, int, float, type(None))) for key, value in info.items() if key != "kernels")
        assert info["kernels"]
        assert all(isinstance(kernel, str) for kernel in info["kernels"])


def test_extra_info_agrees_with_itself_and_with_the_statistics(saved):
    for result in saved.results.values():
        info, median = result["extra_info"], result["stats"]["median"]
        w = Workload.parse(info["workload"])
        for field in dataclasses.fields(Workload):
            assert info[field.name] == (getattr(w, field.name) if field.name != "dtype" else info["workload"].split("-")[-1])
        assert (info["flops"], info["bytes"]) == (w.flops(), w.bytes())
        assert info["tflops"] == pytest.approx(w.flops() / median / 1e12)
        assert info["percent_of_limit"] == pytest.approx(100 * info["limit_s"] / median)
        assert info["raw_median_us"] == pytest.approx(median * 1e6 + info["overhead_us"])
        assert info["vs_sdpa_ci_low"] is None or info["vs_sdpa_ci_low"] <= info["vs_sdpa"] <= info["vs_sdpa_ci_high"]
        assert 0 <= info["error_over_budget"] <= 1
        assert info["build_s"] > 0
        assert (info["direction"], info["device"], info["timer"], info["seed"]) == ("forward", "cpu", "host", 0)


def test_extra_info_of_a_cpu_claims_nothing_of_a_gpu(saved):
    for result in saved.results.values():
        info = result["extra_info"]
        assert [info[key] for key in ("sm_mhz_median", "sm_mhz_p5", "peak_bytes")] == [None] * 3
        assert (info["host_bound"], info["cold_l2"], info["overhead_us"]) == (False, False, 0)


def test_extra_info_names_the_implementation_and_its_library(saved):
    for identity in (ID, SMALL):
        sdpa, handcrafted, mine = (saved.results[f"{identity}-{n}"]["extra_info"] for n in ("sdpa", "handcrafted", "mine"))
        assert sdpa["library"] == handcrafted["library"] == "torch"
        assert (mine["library"], mine["library_version"]) == ("pytest", pytest.__version__)
        assert (mine["approximate"], sdpa["approximate"]) == ("int8", False)
        assert sdpa["vs_sdpa"] == 1
        assert handcrafted["vs_sdpa"] > 0
        assert handcrafted["vs_sdpa_ci_low"] <= handcrafted["vs_sdpa_ci_high"]
        assert sdpa["chosen"]


def test_machine_info_names_the_machine_but_no_host(saved):
    text = (saved.cwd / "run.json").read_text()
    info = json.loads(text)["machine_info"]
    assert info.keys() >= {"gpu", "gpu_count", "driver", "cuda", "cudnn", "torch", "triton", "libraries"}
    assert info["libraries"]["pytest"] == pytest.__version__
    assert "no-such-dist" not in info["libraries"]
    assert info["gpu"] is None
    assert info["cpu"]["brand_raw"]
    for kept in (saved.cwd / "run.json", *stored(saved), *saved.cwd.rglob("*.jsonl")):
        text = kept.read_text()
        assert socket.gethostname() not in text
        assert '"node"' not in text
        assert '"release"' not in text


def test_json_holds_nothing_of_this_process(saved):
    """A file for the repository: no path of this checkout, no address."""
    text = (saved.cwd / "run.json").read_text()
    assert str(saved.cwd) not in text
    assert "/attn_impls/" not in text
    assert " at 0x" not in text


def test_journal_holds_what_the_json_does(run_suite, saved):
    (journal,) = saved.cwd.rglob("*.jsonl")
    made = run_suite("journal", str(journal), "-o", "made/journal.json", module="attn_impls", cwd=saved.cwd)
    assert made.code == 0
    one, other = (json.loads((saved.cwd / name).read_text()) for name in ("run.json", "made/journal.json"))
    assert one["machine_info"] == other["machine_info"]
    assert one["commit_info"] == other["commit_info"]
    assert one.keys() == other.keys()
    assert one["benchmarks"] == other["benchmarks"]
    assert one["not_run"] == other["not_run"]


@pytest.mark.slow
def test_rounds_are_chosen_or_given(run_suite, suite_copy):
    folder = suite_copy()
    run = run_suite("--workload", ID, "--impl=sdpa", "--benchmark-only", "--benchmark-json=run.json", cwd=folder)
    assert 20 <= run.results[f"{ID}-sdpa"]["stats"]["rounds"] <= 100
    one = ("--rounds=1", "--warmup-rounds=0", "--benchmark-only", "--benchmark-json=run.json")
    run = run_suite("--workload", ID, "--impl=sdpa,handcrafted", *one, cwd=folder)
    assert run.code == 0, run.out
    assert [result["stats"]["rounds"] for result in run.results.values()] == [1, 1]
    assert run.results[f"{ID}-handcrafted"]["extra_info"]["vs_sdpa"] is None  # one pair gives no interval


# saved runs and comparisons


@pytest.fixture(scope="module")
def baselines(saved):
    """The saved run, and copies of it as if it had been faster, and made on other machines."""
    (first,) = stored(saved)

    def add(name, change):
        document = json.loads(first.read_text())
        change(document)
        (first.parent / name).write_text(json.dumps(document))

    def faster(document):
        for result in document["benchmarks"]:
            result["stats"] |= {key: result["stats"][key] / 1e6 for key in ("min", "max", "mean", "median")}

    add("0002_faster.json", faster)
    add("0003_gpu.json", lambda document: document["machine_info"].update(gpu="NVIDIA H200"))
    add("0004_cpu.json", lambda document: document["machine_info"]["cpu"].update(brand_raw="Abacus 3000"))
    return saved.cwd


def test_comparison_within_bounds_passes(run_suite, baselines):
    arguments = ("--benchmark-compare=0001", "--benchmark-compare-fail=median:900000%", "--benchmark-autosave")
    run = run_suite(*RUN, *GOOD, *arguments, cwd=baselines)
    assert run.code == 0, run.err
    assert f"test_forward[{ID}-mine] (0001_first)" in run.out
    assert "handcrafted" in run.table
    assert [path.name[:5] for path in stored(run)][-1] == "0005_"


@pytest.mark.slow
def test_comparison_that_regressed_fails_and_still_shows_the_table(run_suite, baselines):
    run = run_suite(*RUN, *GOOD, "--benchmark-compare=0002", "--benchmark-compare-fail=median:5%", cwd=baselines)
    assert run.code == 1
    assert "Performance has regressed" in run.err
    assert f"test_forward[{ID}-mine]" in run.err
    assert "handcrafted" in run.table


@pytest.mark.parametrize(("baseline", "other"), [("0003", "NVIDIA H200"), ("0004", "Abacus 3000")])
def test_comparison_with_another_device_is_refused(run_suite, baselines, baseline, other):
    before = sorted(baselines.rglob("*"))
    run = run_suite(*RUN, *GOOD, f"--benchmark-compare={baseline}", "--benchmark-json=x.json", cwd=baselines)
    assert run.code == 4
    (line,) = (line for line in run.errors if line.startswith("ERROR"))
    assert other in line
    assert "Traceback" not in run.err
    assert "passed" not in run.out
    assert sorted(baselines.rglob("*")) == before


def test_saved_runs_are_compared_by_pytest_benchmark(run_suite, baselines):
    arguments = ("--storage", "store", "compare", "0001", "0002", "--group-by=fullname", "--columns=median")
    run = run_suite(*arguments, module="pytest_benchmark", cwd=baselines)
    assert run.code == 0
    for name in ("sdpa", "handcrafted", "mine"):
        for identity in (ID, SMALL):
            assert f"test_forward[{identity}-{name}]': 2 tests" in run.out


# the last screen


@pytest.fixture(scope="module")
def mixed(run_suite, suite_copy):
    """A run with passes, failures and skips, and every report that pytest can give."""
    folder = suite_copy({"mine.py": MINE})
    return run_suite(
        "--workload", f"{ID},small", "--impl", "sdpa,mine.py,flash_attn2", *QUICK, "-rA", "--durations=3", cwd=folder
    )


def test_table_is_the_last_thing_printed(mixed):
    assert mixed.code == 1
    titles = re.findall(r"^=+ (.*?) =+$", mixed.out, re.MULTILINE)
    assert titles[-2] == "attention"
    assert "2 failed, 4 passed" in titles[-1]
    assert mixed.out.rstrip().endswith("=")


def test_table_names_what_ran_and_why_the_rest_did_not(mixed):
    for identity in (ID, SMALL):
        _, _, group = mixed.table.partition(f"\n{identity}  ")
        group = group.partition("\n\n")[0]
        assert re.search(r"^  sdpa → \w+ ", group, re.MULTILINE)
        assert re.search(r"^  mine ≈ ", group, re.MULTILINE)
        assert group.count("✓") == 2
        assert re.search(r"^  zeros +FAILED: ", group, re.MULTILINE)
    assert re.search(r"^  unable +not today$", mixed.table, re.MULTILINE)
    assert re.search(r"^  absent +not installed: pip install no-such-dist$", mixed.table, re.MULTILINE)
    assert re.search(r"^  flash_attn2 +runs on cuda only", mixed.table, re.MULTILINE)


def test_table_names_the_machine(mixed):
    head = mixed.table.partition("\n\n")[0]
    assert re.search(r"^CPU: .+ threads: \d+", head, re.MULTILINE)
    assert re.search(rf"torch \d.*pytest {re.escape(pytest.__version__)}", head)
    assert socket.gethostname() not in mixed.table


SCALED = {"--workload small": True, f"--workload {ID}": False, f"--workload {ID},small": True, "--seq-len 64": True, "": True}


@pytest.mark.parametrize(("arguments", "scaled"), SCALED.items())
def test_header_states_the_cpu_rule_where_presets_are_scaled(run_suite, saved, arguments, scaled):
    run = run_suite("--co", *arguments.split(), cwd=saved.cwd)
    assert run.code == 0
    assert (CPU_RULE in run.out) == ("CPU-sized" in run.out) == scaled
    assert "no GPU in use" in run.out


def test_table_states_the_cpu_rule_where_presets_are_scaled(run_suite, saved):
    assert "small, CPU-sized" in saved.table
    assert re.sub(r"\s+", " ", CPU_RULE) in re.sub(r"\s+", " ", saved.table)
    run = run_suite("--workload", ID, "--impl=sdpa", *QUICK, cwd=saved.cwd)
    assert run.table
    assert "CPU-sized" not in run.out


# python -m attn_impls


def test_saved_run_is_shown_again(run_suite, saved):
    run = run_suite("show", "run.json", module="attn_impls", cwd=saved.cwd)
    assert run.code == 0
    assert not run.err
    shown = [line for line in run.out.splitlines() if line.strip()]
    tables = saved.table.partition("\n\n")[2].splitlines()
    rows = [line for line in tables if line.startswith(("b", "  ")) and not line.startswith(("    ", "  sdpa took "))]
    assert len(rows) == 2 * (1 + 1 + 3)  # of each workload: its title, the columns' titles, three implementations
    assert [line for line in shown if line in rows] == rows


def test_presets_and_implementations_are_listed(run_suite, saved):
    run = run_suite("list", module="attn_impls", cwd=saved.cwd)
    assert run.code == 0
    assert re.search(r"^  llama3-8b-prefill +b1-h32kv8-s8192-d128-causal-bf16 ", run.out, re.MULTILINE)
    assert re.search(r"^  handcrafted +torch ", run.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("show absent.json", "absent.json"),
        ("show mine.py", "mine.py"),
        ("show tests", "tests"),
        ("show other.json", "other.json"),
        ("journal absent.jsonl -o x.json", "absent.jsonl"),
        ("journal run.json -o x.json", "run.json"),
        ("journal mine.py -o x.json", "mine.py"),
    ],
)
def test_file_that_is_something_else_is_one_line(run_suite, saved, arguments, said):
    (saved.cwd / "other.json").write_text('{"benchmarks": [], "machine_info": {}}')
    run = run_suite(*arguments.split(), module="attn_impls", cwd=saved.cwd)
    assert run.code == 2
    assert len(run.errors) == 1
    assert said in run.err
    assert not (saved.cwd / "x.json").exists()
