"""The command line end to end: what is refused, what is selected, what is printed, and what happens under pytest-xdist."""

import re
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from attn_impls.harness import outside
from attn_impls.harness.options import OPTIONS
from attn_impls.presets import COMBINATIONS, DEFAULT_PRESETS, PRESETS, cpu_sized, preset
from attn_impls.rare import RARE

ID = "b1-h2-s32-d16-fp32"
FULL, CAUSAL = "b1-h2-s32-d16-fp32", "b1-h2-s32-d16-causal-fp32"
TWO = ("--impl", "sdpa,handcrafted")
QUICK = ("--rounds", "3", "--warmup-rounds", "1")
TINY = ("--workload", ID, *TWO, *QUICK)
LONGEST = 400  # characters of an error: one line, but no essay

FILES = {
    "raises.py": "raise RuntimeError('no such luck')\n",
    "imports.py": "import a_library_that_nobody_has\n",
    "syntax.py": "def (:\n",
    "exits.py": "import sys\nsys.exit(3)\n",
    "empty.py": "answer = 42\n",
    "twice.py": "from attn_impls import attention\n\n@attention('sdpa')\ndef sdpa(w): ...\n",
    "layout.py": "from attn_impls import attention\n\n@attention('mine', layout='sbhd')\ndef mine(w): ...\n",
    "library.py": "from attn_impls import attention\n\n"
    "@attention('absent', dist='no-such-dist', install='pip install no-such-dist')\ndef absent(w): ...\n",
    "settings.py": "import torch\ntorch.set_num_threads(torch.get_num_threads() + 1)\n\n"
    "from attn_impls import attention\n\n@attention('set')\ndef set_(w): ...\n",
    "good.py": "from attn_impls import attention\nfrom torch.nn.functional import scaled_dot_product_attention as f\n\n"
    "@attention('mine')\ndef mine(w):\n    return lambda q, k, v: f(q, k, v, is_causal=w.causal)\n",
}

# what is wrong: the arguments, then what the one line says: what was given, what to do
USAGE_ERRORS = {
    "impl unknown": ("--impl sdap", "--impl 'sdap'", "nearest: sdpa"),
    "impl is exact": ("--impl sdpa-fl", "--impl 'sdpa-fl'", "nearest: sdpa-flash"),
    "impl unknown beside a known one": ("--impl sdpa,sdap", "--impl 'sdap'", "nearest: sdpa"),
    "impl like none": ("--impl qqqq", "--impl 'qqqq'", "give one of", "handcrafted"),
    "impl empty": ("--impl ''", "--impl ''", "give"),
    "required impl unknown": ("--require-impl flash_atn2", "--require-impl 'flash_atn2'", "nearest: flash_attn2"),
    "preset unknown": ("--workload llama-prefill", "--workload 'llama-prefill'", "nearest: llama3-8b-prefill"),
    "preset starting like an id": ("--workload base", "--workload 'base'", "no such preset, and not an id", "seed"),
    "glob without a match": ("--workload zz*", "--workload 'zz*'", "give one of", "seed"),
    "workload empty": ("--workload ,", "--workload", "give"),
    "id malformed": ("--workload b1-h32-s8192", "'b1-h32-s8192'", "ids look like", "b1-h32"),
    "id with a dtype unknown": ("--workload b1-h2-s32-d16-fp8", "'b1-h2-s32-d16-fp8'", "bf16|fp16|fp32"),
    "id with no heads": ("--workload b1-h0-s32-d16-fp32", "heads is 0", "above 0"),
    "id with heads indivisible": ("--workload b1-h6kv4-s32-d16-fp32", "heads (6)", "kv_heads (4)", "1, 2, 3, 6"),
    "id not short": ("--workload b1-h2kv2-s32-d16-fp32", "'b1-h2kv2-s32-d16-fp32'", "write 'b1-h2-s32-d16-fp32'"),
    "id too large": ("--workload b1-h32-s999999999-d128-bf16", "b1-h32-s999999999-d128-bf16", "GiB", "smaller"),
    "id absurd": (f"--workload b1-h1-s{10**30}-d1-bf16", "GiB", "smaller"),
    "heads indivisible": ("--num-heads 6 --num-kv-heads 4", "heads (6)", "kv_heads (4)", "1, 2, 3, 6"),
    "embed dim indivisible by heads": ("--embed-dim 100 --num-heads 3", "--embed-dim 100", "3", "multiple of 3"),
    "embed dim indivisible by head dim": ("--embed-dim 100 --head-dim 64", "--embed-dim 100", "64", "multiple of 64"),
    "embed dim against the others": ("--embed-dim 64 --num-heads 2 --head-dim 16", "--embed-dim 64", "16", "leave one"),
    "seq len 0": ("--seq-len 0", "--seq-len '0'", "above 0"),
    "seq len negative": ("--seq-len=-5", "--seq-len '-5'", "above 0"),
    "seq len no number": ("--seq-len 8k", "--seq-len '8k'", "above 0"),
    "seq len fractional": ("--seq-len 32.5", "--seq-len '32.5'", "above 0"),
    "batch size 0 in a sweep": ("--batch-size 1,0", "--batch-size '0'", "above 0"),
    "seq len absurd": ("--seq-len 100000000", "s100000000", "GiB", "smaller"),
    "kv len absurd": ("--kv-len 100000000", "kv100000000", "GiB", "smaller"),
    "dtype unknown": ("--dtype fp8", "--dtype 'fp8'", "bf16, fp16, fp32"),
    "mask unknown": ("--mask triangle", "--mask 'triangle'", "full, causal"),
    "device unknown": ("--device tpu", "--device 'tpu'", "auto, cuda, cpu"),
    "device absent": ("--device cuda", "--device cuda", "--device cpu"),
    "file absent": ("--impl ./absent.py", "absent.py'", "does not exist"),
    "file is a folder": ("--impl ./tests/", "tests'", "does not exist"),
    "file no Python": ("--impl ./pytest.ini", "pytest.ini'", ".py"),
    "file raises": ("--impl ./raises.py", "raises.py'", "does not import", "RuntimeError: no such luck"),
    "file imports what is absent": ("--impl ./imports.py", "imports.py'", "does not import", "a_library_that_nobody_has"),
    "file not valid": ("--impl ./syntax.py", "syntax.py'", "does not import", "SyntaxError"),
    "file exits": ("--impl ./exits.py", "exits.py'", "does not import", "SystemExit"),
    "file registers nothing": ("--impl ./empty.py", "empty.py'", "registers nothing", "@attention"),
    "file takes a known name": ("--impl ./twice.py", "twice.py'", "'sdpa' is registered twice"),
    "file changes settings": ("--impl ./settings.py", "settings.py'", "number of threads", "for all", "in a call"),
    "file with a layout unknown": ("--impl ./layout.py", "layout.py'", "'sbhd'", "bhsd, bshd"),
    "rounds 0": ("--rounds 0", "--rounds '0'", "above 0"),
    "rounds no number": ("--rounds many", "--rounds 'many'", "above 0"),
    "warmup rounds negative": ("--warmup-rounds=-1", "--warmup-rounds '-1'", "0 or more"),
    "seed no number": ("--seed x", "--seed 'x'", "0 or more"),
    "seed too large": (f"--seed {2**70}", "--seed", "give"),
    "timeout 0": ("--case-timeout 0", "--case-timeout '0'", "above 0"),
    "timeout infinite": ("--case-timeout inf", "--case-timeout 'inf'", "above 0"),
    "timeout no number": ("--case-timeout nan", "--case-timeout 'nan'", "above 0"),
}


@pytest.fixture(scope="module")
def folder(suite_copy):
    return suite_copy(FILES)


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("wrong", USAGE_ERRORS)
def test_bad_input_is_one_line_and_writes_nothing(run_suite, folder, wrong):
    arguments, *said = USAGE_ERRORS[wrong]
    before = listing(folder)
    words = [word.strip("'") for word in arguments.split(" ")]
    saving = ("--benchmark-json=x.json", "--benchmark-autosave", "--benchmark-save=x")
    run = run_suite(*words, *saving, "--co", cwd=folder)  # --co: input that is wrongly accepted should not cost a run
    assert run.code == 4, run.out + run.err
    assert len(run.errors) == 1, run.err
    assert run.errors[0].startswith("ERROR: ")
    assert len(run.errors[0]) <= LONGEST
    for text in said:
        assert text in run.errors[0]
    assert not run.out.strip()
    assert listing(folder) == before


def test_size_is_refused_with_what_is_there(run_suite, folder):
    run = run_suite("--workload", "b1-h32-s999999999-d128-bf16", cwd=folder)
    needed, there = (float(gib.replace(",", "")) for gib in re.findall(r"([\d.,]+) GiB", run.err))
    assert needed == pytest.approx(4 * 32 * 999_999_999 * 128 * 2 / 2**30, rel=1e-3)
    assert 0 < there < needed


def test_bad_input_in_the_ini_file_is_a_usage_error_too(run_suite, suite_copy):
    folder = suite_copy()
    with (folder / "pytest.ini").open("a") as ini:
        ini.write("rounds = 0\n")
    run = run_suite("--co", "-q", cwd=folder)
    assert (run.code, len(run.errors)) == (4, 1)
    assert "rounds" in run.err


def test_collection_lists_the_ids_workload_outermost_and_leaves_nothing(run_suite, folder):
    before = listing(folder)
    run = run_suite("--co", "-q", "--workload", f"{FULL},{CAUSAL}", *TWO, cwd=folder)
    names = [f"{identity}-{name}" for identity in (FULL, CAUSAL) for name in ("sdpa", "handcrafted")]
    assert run.code == 0
    tests = ("test_forward", "test_oracle", "test_allclose_to_sdpa", "test_gradients_oracle", "test_gradients_allclose_to_sdpa")
    for test in tests:
        assert [name for name in run.ids if name.startswith(test)] == [f"{test}[{name}]" for name in names]
    assert [name for name in run.ids if name.startswith("test_probes")] == ["test_probes[sdpa]", "test_probes[handcrafted]"]
    assert len(run.ids) == len(tests) * len(names) + 2
    assert "attention" not in run.out
    assert not run.err
    assert set(listing(folder)) - {".benchmarks"} == set(before) - {".benchmarks"}  # pytest-benchmark makes its storage


DEFAULT_CHECKS = ("-m", "correctness", "--impl", "sdpa")


def workloads_of(ids, test):
    """The workloads of a test's ids, in order."""
    return [name.removeprefix(f"{test}[").removesuffix("-sdpa]") for name in ids if name.startswith(f"{test}[")]


def test_correctness_adds_combinations_to_the_default_workloads(run_suite, folder):
    run = run_suite("--co", "-q", "--impl", "sdpa", "-m", "not slow", cwd=folder)
    default = [str(cpu_sized(preset(name))) for name in DEFAULT_PRESETS]
    more = [PRESETS[name][0] for name in COMBINATIONS]
    for test in ("test_oracle", "test_allclose_to_sdpa", "test_gradients_oracle", "test_gradients_allclose_to_sdpa"):
        assert workloads_of(run.ids, test) == [*default, *more]
    for test in ("test_rare_oracle", "test_rare_gradients_oracle"):
        assert workloads_of(run.ids, test) == list(RARE)
    assert workloads_of(run.ids, "test_forward") == default
    assert "adversarial" not in run.out  # the header is not shown with -q


@pytest.mark.parametrize("arguments", ["--workload seed", "--seq-len 64", "--dtype fp32", "--mask causal"])
def test_chosen_workloads_are_all_that_is_checked(run_suite, folder, arguments):
    run = run_suite("--co", "-q", *DEFAULT_CHECKS, *arguments.split(), cwd=folder)
    assert len(workloads_of(run.ids, "test_oracle")) == 1
    assert len(run.ids) == 5


@pytest.mark.parametrize(("arguments", "said"), [("", True), ("--workload small", False), ("--benchmark-only", False)])
def test_header_says_where_more_is_checked_than_timed(run_suite, folder, arguments, said):
    run = run_suite("--co", "--impl", "sdpa", *arguments.split(), cwd=folder)
    also = (
        f"correctness tests: also on {len(COMBINATIONS)} workloads that are not timed (adversarial-…), and {len(RARE)} rarer ones"
    )
    assert (also in run.out) == said


CARELESS = """
from torch.nn.functional import scaled_dot_product_attention
from attn_impls import Unsupported, attention

@attention("careless", backward=False)
def careless(w):
    if w.softcap or w.window:
        raise Unsupported("no softcap, no window")
    mask = w.mask("cpu")
    if w.batch == 3 and w.causal:
        mask = mask.tril()  # aligned top-left
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, mask, scale=w.scale, enable_gqa=True)
"""


@pytest.mark.slow
def test_default_run_finds_what_only_a_combination_shows(run_suite, suite_copy):
    folder = suite_copy({"careless.py": CARELESS})
    run = run_suite("-m", "correctness", "--impl", "./careless.py", "-rfs", cwd=folder)
    failed = re.findall(r"^FAILED \S+::(test_\w+\[\S+\])", run.out, re.MULTILINE)
    name = f"{PRESETS['adversarial-offset'][0]}-careless"
    assert failed == [f"test_oracle[{name}]", f"test_allclose_to_sdpa[{name}]"]
    assert "careless: no softcap, no window" in run.out
    assert "adversarial" not in run.table


@pytest.mark.slow
def test_collection_takes_three_seconds_at_most(run_suite, pytestconfig):
    seconds = []
    for _ in range(4):  # the first may have to compile what it imports
        started = time.perf_counter()
        run = run_suite("--co", "-q", cwd=pytestconfig.rootpath, fresh=True, env={"PYTHONDONTWRITEBYTECODE": ""})
        seconds.append(time.perf_counter() - started)
        assert run.code == 0
    assert min(seconds) <= 3


def collected(run_suite, folder, *arguments):
    """The workload ids that a selection gives, in order."""
    run = run_suite("--co", "-q", "--impl", "sdpa", "-k", "test_forward", *arguments, cwd=folder)
    assert run.code == 0, run.err
    return [name.removeprefix("test_forward[").removesuffix("-sdpa]") for name in run.ids]


# the arguments: the ids of the workloads they select
SELECTIONS = {
    "--workload seed": "b1-h8-s256-d128-bf16",
    "--workload seed,seed-c*": "b1-h8-s256-d128-bf16 b1-h8-s256-d128-causal-bf16",
    f"--workload {FULL} --workload odd": f"{FULL} b2-h6kv3-s47-d64-causal-bf16",
    f"--workload {FULL},{FULL}": FULL,
    "--seq-len 64 --num-heads 2": "b1-h2-s64-d128-bf16",
    f"--workload {FULL} --seq-len 16,32 --mask full,causal": f"b1-h2-s16-d16-fp32 b1-h2-s16-d16-causal-fp32 {FULL} {CAUSAL}",
    f"--workload {FULL} --batch-size 1 --batch-size 2": "b1-h2-s32-d16-fp32 b2-h2-s32-d16-fp32",
    f"--workload {FULL},{CAUSAL} --dtype bf16": "b1-h2-s32-d16-bf16 b1-h2-s32-d16-causal-bf16",
    f"--workload {FULL} --kv-len 64": "b1-h2-q32kv64-d16-fp32",
    f"--workload {FULL} --num-heads 4 --num-kv-heads 2": "b1-h4kv2-s32-d16-fp32",
    f"--workload {FULL} --head-dim 32,64": "b1-h2-s32-d32-fp32 b1-h2-s32-d64-fp32",
    f"--workload {FULL} --embed-dim 64": "b1-h2-s32-d32-fp32",
    f"--workload {FULL} --embed-dim 64 --num-heads 4": "b1-h4-s32-d16-fp32",
    f"--workload {FULL} --embed-dim 64 --head-dim 16": "b1-h4-s32-d16-fp32",
}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", SELECTIONS)
def test_selection_of_workloads(run_suite, folder, arguments):
    assert collected(run_suite, folder, *arguments.split()) == SELECTIONS[arguments].split()


def test_selection_of_implementations(run_suite, folder):
    run = run_suite(
        "--co", "-q", "--workload", ID, "-k", "forward", "--impl", "sdpa,./good.py", "--impl", "sdpa-math", cwd=folder
    )
    assert run.ids == [f"test_forward[{ID}-{name}]" for name in ("sdpa", "mine", "sdpa-math")]


def test_selection_by_id(run_suite, folder):
    run = run_suite("--co", "-q", *TINY, "-k", f"test_forward and {ID}-handcrafted", cwd=folder)
    assert run.ids == [f"test_forward[{ID}-handcrafted]"]
    run = run_suite("--co", "-q", *TINY, f"tests/test_benchmark.py::test_forward[{ID}-sdpa]", cwd=folder)
    assert run.ids == [f"test_forward[{ID}-sdpa]"]


def test_ini_file_gives_defaults_that_the_command_line_overrides(run_suite, suite_copy):
    folder = suite_copy(FILES)
    with (folder / "pytest.ini").open("a") as ini:
        ini.write(f"workload = {ID}\nseq_len = 16,24\nimpl = sdpa-math ./good.py\nrounds = 4\nwarmup_rounds = 1\n")
    run = run_suite("--benchmark-only", "-q", "--benchmark-json=run.json", "--seq-len=16,8", cwd=folder)
    assert run.code == 0
    assert list(run.results) == [f"b1-h2-s{s}-d16-fp32-{name}" for s in (16, 8) for name in ("sdpa-math", "mine")]
    assert {result["stats"]["rounds"] for result in run.results.values()} == {4}
    run = run_suite("--co", "-q", "-k", "forward", "--impl=sdpa", cwd=folder)
    assert run.ids == [f"test_forward[b1-h2-s{s}-d16-fp32-sdpa]" for s in (16, 24)]


def test_ini_file_names_files_beside_itself(run_suite, suite_copy):
    folder = suite_copy(FILES)
    with (folder / "pytest.ini").open("a") as ini:
        ini.write(f"workload = {ID}\nimpl = ./good.py\n")
    run = run_suite("--co", "-q", "-k", "forward", cwd=folder / "tests")
    assert run.ids == [f"test_forward[{ID}-mine]"], run.err


def test_help_lists_every_option_with_its_metavar_and_ini_key(run_suite, folder):
    out = run_suite("--help", cwd=folder).out
    own, _, rest = out.partition("attention comparison:")[2].partition("\n\n")
    for option in OPTIONS:
        value = rf"[ =]{re.escape(option.metavar)}\b" if option.metavar else r"\s"
        assert re.search(rf"^  {option.flag}{value}", own, re.MULTILINE), option.flag
        assert re.search(rf"^  {option.name} \(", rest, re.MULTILINE), option.name


SHOWN = ("--workload", "odd", "--seq-len=32", "--batch-size=1", "--impl=sdpa,handcrafted,flash_attn2,./library.py", *QUICK)


@pytest.fixture(scope="module")
def narrow(run_suite, suite_copy):
    """An ordinary run on 80 columns, in an ordinary process."""
    return run_suite(*SHOWN, "--benchmark-only", cwd=suite_copy(FILES), env={"COLUMNS": "80"}, fresh=True)


@pytest.fixture(scope="module")
def wide(run_suite, suite_copy):
    """A quiet one in colour on 160 columns, with the option that turns pytest-xdist off."""
    arguments = ("--benchmark-only", "-q", "--color=yes", "-n", "0", "--benchmark-json=run.json")
    return run_suite(*SHOWN, *arguments, cwd=suite_copy(FILES), env={"COLUMNS": "160"})


def test_plain_run(narrow):
    assert narrow.code == 0, narrow.out + narrow.err
    assert "2 passed, 2 skipped" in narrow.out
    assert "warning" not in narrow.out.lower()
    assert not narrow.err
    assert "no GPU" in narrow.out


@pytest.mark.slow
def test_run_leaves_no_more_than_its_journal(narrow, suite_copy):
    new = set(listing(narrow.cwd)) - set(listing(suite_copy(FILES)))
    journals = [path for path in new if path.endswith(".jsonl")]
    assert new == {".benchmarks", ".benchmarks/journal", *journals}
    assert len(journals) == 1


def test_xdist_of_no_workers_runs_benchmarks(wide):
    assert wide.code == 0
    assert len(wide.results) == 2


def test_quiet_run_keeps_the_table(wide):
    assert "rootdir" not in wide.out
    for name in ("sdpa", "handcrafted", "flash_attn2", "absent"):
        assert re.search(rf"^\S*  {name} ", wide.table, re.MULTILINE), name


def test_colour_only_where_it_is_wanted(narrow, wide):
    assert "\x1b" not in narrow.out + narrow.err
    assert re.search(r"\x1b\[\d+m  implementation ", wide.out)


@pytest.mark.parametrize(("shown", "columns"), [("narrow", 80), ("wide", 160)])
def test_table_fits_the_terminal(request, shown, columns):
    table = re.sub(r"\x1b\[[\d;]*m", "", request.getfixturevalue(shown).table)
    lines = table.splitlines()[1:-1]  # the first and the last are pytest's
    assert [line for line in lines if len(line) > columns] == []
    assert ("kernel  " in table or "kernel\n" in table) == (columns == 160)
    assert "vs sdpa" in table
    assert "not installed: pip install no-such-dist" in table


# pytest-xdist


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", ["--benchmark-only", "tests/test_benchmark.py", f"tests/test_benchmark.py::test_forward[{ID}-sdpa]"]
)
def test_benchmarks_asked_for_under_xdist_are_refused(run_suite, folder, asked):
    before = listing(folder)
    run = run_suite(*TINY, "-n", "2", asked, "--benchmark-json=x.json", cwd=folder)
    assert run.code == 4
    assert len(run.errors) == 1
    assert "pytest-xdist" in run.err
    assert "-n 0" in run.err
    assert listing(folder) == before


@pytest.mark.slow
def test_xdist_checks_and_skips_benchmarks(run_suite, suite_copy):
    folder = suite_copy({"zeros.py": "from attn_impls import attention\n\n@attention('zeros')\ndef zeros(w):\n"
                         "    return lambda q, k, v: q * 0\n"})  # fmt: skip
    run = run_suite(*TINY, "--impl", "./zeros.py", "-n", "2", "-rs", cwd=folder)
    assert run.code == 1
    assert "5 failed, 10 passed, 3 skipped" in run.out
    assert re.search(r"SKIPPED \[3\].*benchmarks do not run under pytest-xdist", run.out)
    # a worker's failures too say how to run them alone, with the options that the run had
    rerun = run.failure(f"test_oracle[{ID}-zeros]").splitlines()[-1]
    assert rerun.startswith("pytest ")
    assert "./zeros.py" in rerun
    assert "--device cpu" in rerun


@pytest.mark.slow
def test_xdist_correctness(run_suite):
    run = run_suite(*TINY, "-n", "2", "-m", "correctness")
    assert run.code == 0
    assert "10 passed" in run.out
    assert "skipped" not in run.out


def test_benchmarks_disabled(run_suite):
    run = run_suite(*TINY, "--benchmark-disable")
    assert run.code == 0
    assert "12 passed" in run.out
    assert not run.table


def test_benchmarks_skipped(run_suite):
    run = run_suite(*TINY, "--benchmark-skip")
    assert run.code == 0
    assert "10 passed, 2 skipped" in run.out
    assert not run.table
    assert not list(run.cwd.rglob("*.jsonl"))


@pytest.mark.parametrize("told", [True, False])
def test_a_file_of_another_folder_needs_an_equals_sign(monkeypatch, tmp_path, folder, told):
    """pytest has no pytest.ini then, and with it none of the suite's options."""
    (tmp_path / "mine.py").write_text("")
    monkeypatch.chdir(folder)
    config = SimpleNamespace(inipath=None if told else folder / "pytest.ini")
    arguments = ["-m", "correctness", "--impl", str(tmp_path / "mine.py")]
    with pytest.raises(pytest.UsageError, match=r"write --impl=.*mine\.py") if told else nullcontext():
        outside.pytest_load_initial_conftests(config, arguments)


def test_what_compiles_is_slow_where_no_benchmark_needs_it(run_suite, folder):
    run = run_suite("--co", "-q", "-m", "correctness and slow", "--impl", "sdpa,flex", cwd=folder)
    assert run.ids
    assert all(identity.endswith("-flex]") for identity in run.ids)
    assert len(run.ids) == 4 * len(COMBINATIONS)
    for nothing in ("flex", "flash_attn3"):  # one compiles, one is not for a CPU
        ids = run_suite("--co", "-q", "-m", "rare", "--impl", f"sdpa,{nothing}", cwd=folder).ids
        assert len(ids) == 2 * len(RARE)
        assert all(identity.endswith("-sdpa]") for identity in ids)
        assert "skipped" not in run_suite("-q", "-m", "rare", "--impl", nothing, cwd=folder).out
    assert not run_suite("--co", "-q", "-m", "correctness and slow", "--impl", "flex", "--workload", "small", cwd=folder).ids
