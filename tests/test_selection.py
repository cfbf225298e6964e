"""What a run covers: options to workloads and implementations on a CPU, and every usage error in one line."""

import sys

import pytest
import torch

from attn_impls import Workload
from attn_impls.harness import selection
from attn_impls.harness.options import OPTIONS
from attn_impls.presets import COMBINATIONS, CPU_RULE, DEFAULT_PRESETS, PRESETS, cpu_sized, preset
from attn_impls.rare import RARE
from attn_impls.registry import REGISTRY

BASE = "b1-h8-s64-d32-bf16"
MINE = 'from attn_impls import attention\n@attention("mine")\ndef f(w):\n    return lambda q, k, v: q\n'


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch):
    """A machine of 64 GiB without a GPU, and REGISTRY restored after the test."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(selection, "device_bytes", lambda _: 2**36)
    before, modules = dict(REGISTRY), set(sys.modules)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("attn_impls_file_"):
            del sys.modules[name]


def resolve(**given):
    options = {option.name: [] if option.convert is None else option.default for option in OPTIONS}
    assert set(given) <= set(options)
    return selection.resolve(options | given)


def ids(**given) -> list[str]:
    return [str(w) for w in resolve(**given).workloads]


def names(**given) -> list[str]:
    return [implementation.name for implementation in resolve(**given).implementations]


def scaled(*presets: str) -> list[str]:
    return [str(preset(name) if name in COMBINATIONS else cpu_sized(preset(name))) for name in presets]


def test_defaults():
    selected = resolve()
    assert selected.device == "cpu"
    assert [str(w) for w in selected.workloads] == scaled(*DEFAULT_PRESETS)
    assert list(selected.labels.items()) == [
        (w, f"{name}, CPU-sized") for w, name in zip(selected.workloads, DEFAULT_PRESETS, strict=True)
    ]
    assert selected.implementations == tuple(REGISTRY.values())
    assert (selected.required, selected.rounds, selected.warmup_rounds, selected.seed) == (frozenset(), None, None, 0)
    assert selected.cpu_rule == CPU_RULE


def test_plain_options_pass_through():
    selected = resolve(device="cpu", rounds=7, warmup_rounds=0, seed=3, case_timeout=1.5)
    assert (selected.rounds, selected.warmup_rounds, selected.seed, selected.case_timeout) == (7, 0, 3, 1.5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_combinations_are_checked_with_the_default_workloads_alone(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve(device=device).also_checked == tuple(map(preset, COMBINATIONS))
    assert not set(resolve(device=device).also_checked) & set(resolve(device=device).workloads)
    assert resolve(device=device).rare == tuple(map(Workload.parse, RARE))
    assert not set(resolve(device=device).rare) & {*resolve(device=device).workloads, *resolve(device=device).also_checked}
    for chosen in ({"workload": ["seed"]}, {"seq_len": ["64"]}, {"dtype": ["bf16"]}, {"mask": ["causal"]}):
        assert resolve(device=device, **chosen).also_checked == resolve(device=device, **chosen).rare == ()
    assert resolve(device=device, impl=["sdpa"], seed=3).also_checked


def test_combinations_are_not_scaled():
    selected = resolve(workload=list(COMBINATIONS))
    assert selected.labels == {preset(name): name for name in COMBINATIONS}
    assert selected.cpu_rule == ""


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_presets_keep_their_size_on_a_gpu(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    selected = resolve(device=device)
    assert (selected.device, selected.cpu_rule) == ("cuda", "")
    assert selected.labels == {preset(name): name for name in DEFAULT_PRESETS}
    assert resolve(device="cpu").device == "cpu"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (["small"], scaled("small")),
        (["small", "seed"], scaled("small", "seed")),  # in the order given
        (["seed", "small", "seed"], scaled("seed", "small")),  # each once
        (["seed*"], scaled(*(name for name in PRESETS if name.startswith("seed")))),
        (["*-*prefill"], scaled(*(name for name in PRESETS if "-" in name and name.endswith("prefill")))),
        (["*"], list(dict.fromkeys(scaled(*PRESETS)))),
        ([BASE], [BASE]),
        (["b1-h32-s8192-d128-bf16"], ["b1-h32-s8192-d128-bf16"]),  # an id means what it says
        ([BASE, "odd"], [BASE, *scaled("odd")]),
    ],
)
def test_workloads(chosen, expected):
    assert ids(workload=chosen) == expected


def test_labels_are_for_presets_only():
    selected = resolve(workload=[BASE, "seed"], dtype=["bf16", "fp16"])
    seed = cpu_sized(preset("seed"))
    assert len(selected.workloads) == 4
    assert selected.labels == {seed: "seed, CPU-sized"}  # in fp16 it is another workload
    assert selected.cpu_rule == CPU_RULE
    assert resolve(workload=[BASE]).cpu_rule == ""


def test_overrides_alone_change_the_seed_workload():
    assert ids(seq_len=["96"]) == [str(cpu_sized(preset("seed")).replace(q_len=96))]


GQA = "b1-h8kv2-q1kv64-d32-causal-win16-bf16"
MLA = "b1-h8-s64-d96v64-causal-scale48-bf16"


@pytest.mark.parametrize(
    ("base", "given", "expected"),
    [
        (BASE, {"batch_size": ["3"]}, "b3-h8-s64-d32-bf16"),
        (BASE, {"seq_len": ["128"]}, "b1-h8-s128-d32-bf16"),  # the KV length follows
        (BASE, {"kv_len": ["128"]}, "b1-h8-q64kv128-d32-bf16"),
        (BASE, {"seq_len": ["1"], "kv_len": ["128"]}, "b1-h8-q1kv128-d32-bf16"),
        (BASE, {"num_heads": ["4"]}, "b1-h4-s64-d32-bf16"),  # the KV heads follow
        (BASE, {"num_kv_heads": ["2"]}, "b1-h8kv2-s64-d32-bf16"),
        (BASE, {"num_heads": ["12"], "num_kv_heads": ["3"]}, "b1-h12kv3-s64-d32-bf16"),
        (BASE, {"head_dim": ["64"]}, "b1-h8-s64-d64-bf16"),
        (BASE, {"dtype": ["fp16"]}, "b1-h8-s64-d32-fp16"),
        (BASE, {"dtype": ["fp32"]}, "b1-h8-s64-d32-fp32"),
        (BASE, {"mask": ["causal"]}, "b1-h8-s64-d32-causal-bf16"),
        (BASE, {"mask": ["full"]}, BASE),
        (GQA, {"seq_len": ["2"]}, "b1-h8kv2-q2kv64-d32-causal-win16-bf16"),  # nothing to follow
        (GQA, {"num_heads": ["4"]}, "b1-h4kv2-q1kv64-d32-causal-win16-bf16"),
        (GQA, {"mask": ["full"]}, "b1-h8kv2-q1kv64-d32-bf16"),  # a window needs causal
        (GQA, {"mask": ["causal"]}, GQA),
        (MLA, {"head_dim": ["64"]}, "b1-h8-s64-d64-causal-scale48-bf16"),
        (MLA, {"head_dim": ["48"]}, "b1-h8-s64-d48v64-causal-bf16"),
        # embed dim = heads × head dim
        (BASE, {"embed_dim": ["512"]}, "b1-h8-s64-d64-bf16"),
        (BASE, {"embed_dim": ["512"], "num_heads": ["4"]}, "b1-h4-s64-d128-bf16"),
        (BASE, {"embed_dim": ["512"], "head_dim": ["16"]}, "b1-h32-s64-d16-bf16"),
        (BASE, {"embed_dim": ["512"], "num_heads": ["16"], "head_dim": ["32"]}, "b1-h16-s64-d32-bf16"),
        (GQA, {"embed_dim": ["128"], "head_dim": ["32"]}, "b1-h4kv2-q1kv64-d32-causal-win16-bf16"),
        (
            BASE,
            {
                "batch_size": ["2"],
                "seq_len": ["32"],
                "kv_len": ["48"],
                "num_kv_heads": ["4"],
                "dtype": ["fp16"],
                "mask": ["causal"],
            },
            "b2-h8kv4-q32kv48-d32-causal-fp16",
        ),
    ],
)
def test_overrides(base, given, expected):
    assert ids(workload=[base], **given) == [expected]


def test_sweeps_are_products():
    swept = ids(workload=[BASE, GQA], seq_len=["8", "16"], dtype=["bf16", "fp16"], mask=["causal"])
    assert swept == [
        *(f"b1-h8-s{s}-d32-causal-{dtype}" for s in (8, 16) for dtype in ("bf16", "fp16")),
        *(f"b1-h8kv2-q{s}kv64-d32-causal-win16-{dtype}" for s in (8, 16) for dtype in ("bf16", "fp16")),
    ]
    assert ids(workload=[BASE], mask=["full", "causal", "full"]) == [BASE, BASE.replace("-bf16", "-causal-bf16")]
    assert ids(workload=[BASE], embed_dim=["256", "512"], num_heads=["8", "16"]) == [
        *("b1-h8-s64-d32-bf16", "b1-h16-s64-d16-bf16", "b1-h8-s64-d64-bf16", "b1-h16-s64-d32-bf16")
    ]


def test_implementations():
    assert names() == list(REGISTRY)
    assert names(impl=["sdpa-math", "handcrafted", "sdpa-math"]) == ["sdpa-math", "handcrafted"]
    assert names(impl=["flash_attn2"]) == ["flash_attn2"]  # that it cannot run is its cases' business


def test_require_impl():
    selected = resolve(impl=["handcrafted"], require_impl=["sdpa", "flash_attn2"])
    assert [i.name for i in selected.implementations] == ["handcrafted", "sdpa", "flash_attn2"]
    assert selected.required == {"sdpa", "flash_attn2"}
    assert names(require_impl=["sdpa"]) == list(REGISTRY)


def test_files(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    assert names(impl=[str(tmp_path / "mine.py"), "sdpa"], require_impl=["mine"]) == ["mine", "sdpa"]


def given_id(value: object) -> str:
    return " ".join(f"{key}={str(words)[:40]}" for key, words in value.items()) if isinstance(value, dict) else ""


ERRORS = [
    # device
    ({"device": "cuda"}, ("--device cuda", "no CUDA device", "--device cpu")),
    ({"device": "tpu"}, ("--device 'tpu'", "auto, cuda, cpu")),
    # workloads
    ({"workload": ["llama3-8b-prefil"]}, ("--workload 'llama3-8b-prefil'", "llama3-8b-prefill")),
    ({"workload": ["sed"]}, ("--workload 'sed'", "nearest", "seed")),
    ({"workload": ["zzz*"]}, ("--workload 'zzz*'", *DEFAULT_PRESETS)),
    ({"workload": [BASE, "h32-s8192-d128-bf16"]}, ("--workload 'h32-s8192-d128-bf16'", "not an id")),
    ({"workload": ["b1-h32"]}, ("'b1-h32'", "ids look like")),
    ({"workload": ["b1-h32kv5-s8-d8-bf16"]}, ("'b1-h32kv5-s8-d8-bf16'", "heads (32)", "kv_heads (5)")),
    ({"workload": ["two\nlines"]}, ("'two\\nlines'",)),
    # numbers
    *(
        ({"workload": [BASE], option: ["8", word]}, (f"--{option.replace('_', '-')} {word!r}", "whole numbers above 0"))
        for option, word in zip(selection.NUMBERS, ("0", "-1", "1.5", "1e3", "many", "²", " "), strict=True)
    ),
    *(({"seq_len": ["9" * digits]}, ("9" * 20,)) for digits in (30, 400, 5000)),
    ({"workload": [f"b1-h1-s{'9' * 400}-d1-bf16"]}, ("9" * 20,)),
    # words
    ({"dtype": ["bf16", "float16"]}, ("--dtype 'float16'", "bf16, fp16, fp32")),
    ({"mask": ["sliding"]}, ("--mask 'sliding'", "full, causal")),
    # combinations
    ({"workload": [BASE], "num_kv_heads": ["3"]}, ("heads (8)", "kv_heads (3)", "1, 2, 4, 8")),
    ({"workload": [GQA], "num_heads": ["5"]}, ("heads (5)", "kv_heads (2)")),
    ({"workload": [BASE], "embed_dim": ["500"]}, ("--embed-dim 500", "heads 8", "multiple of 8")),
    ({"workload": [BASE], "embed_dim": ["4"]}, ("--embed-dim 4", "heads 8")),
    ({"workload": [BASE], "embed_dim": ["512"], "num_heads": ["5"]}, ("--embed-dim 512", "heads 5")),
    ({"workload": [BASE], "embed_dim": ["512"], "head_dim": ["48"]}, ("--embed-dim 512", "head_dim 48", "multiple of 48")),
    (
        {"workload": [BASE], "embed_dim": ["512"], "num_heads": ["8"], "head_dim": ["32"]},
        ("--embed-dim 512", "8 heads", "head dim 32", "leave one"),
    ),
    ({"workload": [BASE], "embed_dim": ["512"], "num_heads": ["8", "7"]}, ("--embed-dim 512", "heads 7")),
    # size: q, k, v and the output of 32 GiB each
    ({"workload": ["b8-h32-s524288-d128-bf16"]}, ("b8-h32-s524288-d128-bf16", "128.0 GiB", "64.0 GiB", "cpu")),
    ({"workload": [BASE, "b8-h32-s64-d128-bf16"], "seq_len": ["64", "524288"]}, ("b8-h32-s524288-d128-bf16", "128.0 GiB")),
    # implementations
    ({"impl": ["flash_attn"]}, ("--impl 'flash_attn'", "nearest", "flash_attn2")),
    ({"impl": ["sdpa", "spda"]}, ("--impl 'spda'", "sdpa")),
    ({"impl": ["zzz"]}, ("--impl 'zzz'", "handcrafted", "flex")),
    ({"require_impl": ["xformer"]}, ("--require-impl 'xformer'", "xformers")),
    ({"impl": ["no/such/file.py"]}, ("no/such/file.py", "does not exist")),
    ({"impl": ["no_such_file.py"]}, ("no_such_file.py", "does not exist")),
]


@pytest.mark.parametrize(("given", "words"), ERRORS, ids=given_id)
def test_usage_errors(given, words):
    with pytest.raises(pytest.UsageError) as caught:
        resolve(**given)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [("def broken(:", "SyntaxError"), ("raise OSError('one\\ntwo')", "OSError: one"), ("", "registers nothing")],
)
def test_usage_errors_of_a_file(tmp_path, source, words):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(pytest.UsageError) as caught:
        resolve(impl=[str(path)])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_just_fits():
    w = Workload.parse("b8-h32-s262144-d128-bf16")  # 16 GiB each
    assert resolve(workload=[str(w)]).workloads == (w,)
    with pytest.raises(pytest.UsageError, match="would not fit"):
        resolve(workload=[str(w.replace(batch=9))])


def test_fit_is_judged_by_this_machine(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(pytest.UsageError, match=r"need 512,000\.0 GiB, and this cpu device has [0-9.,]+ GiB; give smaller sizes"):
        resolve(device="cpu", workload=["b1000-h32-s16777216-d128-bf16"])
