"""The registry: @attention, discovery, what is unavailable and what is broken, files and entry points of third parties."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attn_impls import Unsupported, Workload, attention
from attn_impls.harness import inputs, selection, settings
from attn_impls.harness.case import Broken, Case, CaseFailed, build, call
from attn_impls.harness.options import OPTIONS
from attn_impls.registry import LAYOUTS, REGISTRY, discover, load_file

W = Workload(batch=1, heads=2, q_len=4, head_dim=8)
BUILT_IN = (
    *("handcrafted", "compiled", "sdpa", "sdpa-math", "sdpa-flash", "sdpa-efficient", "sdpa-cudnn"),
    *("xformers", "xformers-cutlass", "xformers-flash", "flash_attn2", "flash_attn3", "flash_attn4", "flex"),
    *("sage", "cudnn-frontend", "flashinfer"),
)
MISSING = "no-such-distribution"


@pytest.fixture(autouse=True)
def _restored_registry(tmp_path):
    """REGISTRY as it was, and none of a test's own modules left, whatever it registers or imports."""
    before, modules = dict(discover()), set(sys.modules)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install("dist", entry_points={...}, module="source") makes a distribution look installed, at version 1.2.3."""

    def install(dist: str, entry_points: dict[str, str] | None = None, **modules: str) -> None:
        info = tmp_path / f"{dist.replace('-', '_')}-1.2.3.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2.3\n")
        if entry_points:
            lines = [f"{name} = {value}" for name, value in entry_points.items()]
            (info / "entry_points.txt").write_text("\n".join(["[attn_impls]", *lines, ""]))
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)
            for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
                monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.syspath_prepend(tmp_path)

    return install


def one_line(caught: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


def built(implementation):
    """Build as the harness does."""
    return build(Case(W, implementation, "cpu"), inputs.plain(W, "cpu", 0))


def test_a_name_over_a_builder_is_an_implementation():
    @attention("mine")
    def mine(w: Workload):
        return lambda q, *_: q * w.heads

    assert REGISTRY["mine"] is mine
    assert (mine.name, mine.layout, mine.devices, mine.backward, mine.approximate) == (
        "mine",
        "bhsd",
        ("cuda", "cpu"),
        True,
        False,
    )
    assert (mine.dist, mine.version, mine.source) == ("", torch.__version__, __file__)
    assert mine.unavailable("cuda") == mine.unavailable("cpu") == ""
    assert torch.equal(mine(W)(torch.ones(3), None, None), torch.full((3,), 2.0))
    found = built(mine)
    assert callable(found.kernel)
    assert found.seconds > 0
    assert torch.equal(found.out, inputs.plain(W, "cpu", 0).q * W.heads)


def test_a_second_builder_returns_the_lse():
    mine = attention("mine")(lambda _: lambda q, *_: q)
    assert mine.lse_builder is None

    @mine.with_lse
    def with_lse(w: Workload):
        return lambda q, *_: (q, w.scale)

    assert mine.lse_builder is with_lse
    assert mine(W)(1, 2, 3) == 1


@pytest.mark.parametrize("name", ["", "a,b", "a[b", "a]b", "a b", "a=b", "a/b", "a\nb", "a\tb", "a::b", "a*b", "a(b)", "mine.py"])
def test_names_that_no_option_could_take(name):
    with pytest.raises(ValueError, match="name") as caught:
        attention(name)(lambda _: None)
    assert repr(name) in one_line(caught)
    assert name not in REGISTRY


@pytest.mark.parametrize("options", [{"layout": "sbhd"}, {"devices": ("gpu",)}, {"devices": "cuda"}], ids=str)
def test_options_that_would_never_run(options):
    with pytest.raises(ValueError, match="'mine'") as caught:
        attention("mine", **options)(lambda _: None)
    assert next(iter(options)) in one_line(caught)
    assert "mine" not in REGISTRY


def test_duplicates_name_both_files():
    def theirs(_):
        return None

    with pytest.raises(ValueError, match="'sdpa' is registered twice") as caught:
        attention("sdpa")(theirs)
    assert REGISTRY["sdpa"].source in one_line(caught)
    assert __file__ in one_line(caught)
    assert REGISTRY["sdpa"].build is not theirs


def test_built_ins():
    found = discover()
    assert set(BUILT_IN) <= set(found)
    for name in BUILT_IN:
        implementation = found[name]
        assert implementation.name == name
        assert implementation.layout in LAYOUTS
        assert Path(implementation.source).parent.name == "attn_impls"
        assert bool(implementation.dists) == bool(implementation.install)  # who needs a library says how to get it
        assert "\n" not in implementation.install


def test_the_plugin_that_every_pytest_loads_imports_no_torch():
    code = "import sys, attn_impls.harness.outside as _; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_public_names_are_there():
    code = "from attn_impls import *; print(Workload.__module__, Unsupported.__module__, attention.__module__)"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout.split() == ["attn_impls.workload", "attn_impls.registry", "attn_impls.registry"]
    with pytest.raises(ImportError):
        from attn_impls import nothing_of_that_name  # noqa: F401


def test_discovery_imports_no_library(tmp_path):
    libraries = {"xformers", "flash_attn", "flash_attn_interface", "fa3_fwd_interface", "cutlass", "transformer_engine"}
    libraries |= {"sageattention", "cudnn", "flashinfer"}
    for name in libraries:  # importable, so that an import at module level would show
        (tmp_path / f"{name}.py").write_text("")
    code = """
import json, sys, torch
before = set(sys.modules)
import attn_impls.registry
names = list(attn_impls.registry.discover())
print(json.dumps([names, sorted(set(sys.modules) - before)]))
"""
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path})
    names, imported = json.loads(ran.stdout)
    assert set(BUILT_IN) <= set(names)
    assert "attn_impls.flex" in imported
    assert not {module.partition(".")[0] for module in imported} & (libraries | {"triton"})


@pytest.mark.parametrize(
    ("options", "device", "reason"),
    [
        ({"devices": ("cuda",)}, "cpu", "runs on cuda only; this run is on cpu"),
        ({"devices": ("cpu",), "dist": MISSING}, "cuda", "runs on cpu only; this run is on cuda"),
        ({"dist": MISSING, "install": "pip install it"}, "cpu", "not installed: pip install it"),
        ({"dist": MISSING}, "cpu", f"not installed: pip install {MISSING}"),
        ({"dist": (MISSING, "nor-this-one")}, "cpu", f"not installed: pip install {MISSING}"),
        ({"dist": "pytest", "devices": ("cuda",)}, "cuda", ""),
        ({"dist": (MISSING, "pytest")}, "cpu", ""),
        ({}, "cpu", ""),
    ],
)
def test_unavailable(options, device, reason):
    assert attention("mine", **options)(lambda _: None).unavailable(device) == reason


def test_any_of_several_distributions_will_do(install):
    mine = attention("mine", dist=(MISSING, "fake-lib", "pytest"))(lambda _: None)
    assert (mine.dist, mine.version) == ("pytest", pytest.__version__)
    install("fake-lib")
    assert (mine.dist, mine.version) == ("fake-lib", "1.2.3")
    assert attention("other", dist=MISSING)(lambda _: None).version == ""


def test_an_importable_module_proves_no_installation(install):
    install("flash-attn-4", flash_attn="")  # brings the namespace of flash-attn
    mine = attention("mine", dist="flash-attn-absent", install="get it")(lambda _: None)
    assert mine.unavailable("cpu") == "not installed: get it"


BREAKAGES = {
    "missing libcudart": ("raise ImportError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
    "unloadable": ("raise OSError('/lib/_C.so: undefined symbol: _ZN3c10')", "undefined symbol: _ZN3c10"),
    "missing dependency": ("import no_such_dependency", "no_such_dependency"),
    "missing symbol": ("", "attend"),
    "torch too old": ("import torch; torch.no_such_attribute", "no_such_attribute"),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_installed_but_broken(install, breakage):
    source, clue = BREAKAGES[breakage]
    install("fake-lib", fake_lib=source)

    @attention("mine", dist="fake-lib", install="pip install fake-lib==9")
    def mine(_):
        from fake_lib import attend

        return attend

    assert mine.unavailable("cpu") == ""  # no silent skip
    with pytest.raises(Broken) as caught:
        built(mine)
    first = str(caught.value).splitlines()[0]  # the summary shows this line alone
    for words in ("mine", "broken", "fake-lib 1.2.3", clue):
        assert words in first
    assert "pip install fake-lib==9" in str(caught.value)


def test_broken_without_an_install_line_says_how_to_reinstall(install):
    install("fake-lib", fake_lib="raise ImportError('no')")
    mine = attention("mine", dist="fake-lib")(lambda _: __import__("fake_lib"))
    with pytest.raises(Broken, match="pip install fake-lib"):
        built(mine)


@pytest.mark.parametrize(
    ("name", "dist", "module"),
    [
        ("flash_attn2", "flash-attn", "flash_attn"),
        ("flash_attn4", "flash-attn-4", "flash_attn"),
        ("xformers", "xformers", "xformers"),
        ("xformers-cutlass", "xformers", "xformers"),
        ("sage", "sageattention", "sageattention"),
        ("cudnn-frontend", "nvidia-cudnn-frontend", "cudnn"),
        ("flashinfer", "flashinfer-python", "flashinfer"),
    ],
)
def test_a_broken_library_of_a_built_in(install, name, dist, module):
    install(dist, **{module: "raise ImportError('libcudart.so.12: cannot open shared object file')"})
    with pytest.raises(Broken, match=rf"^{name} is installed but broken \({dist} 1\.2\.3\): ImportError: libcudart\.so\.12"):
        built(REGISTRY[name])


@pytest.mark.parametrize("error", [ImportError("gone"), RuntimeError("no such size"), SystemExit(3)], ids=repr)
def test_what_fails_one_case_breaks_no_library(error):
    def raises(*_):
        raise error

    needs_nothing = attention("needs-nothing")(raises)
    kernel_fails = attention("kernel-fails", dist="pytest")(lambda _: raises)
    for implementation, stage in ((needs_nothing, "builder"), (kernel_fails, "kernel")):
        with pytest.raises(CaseFailed, match=f"{implementation.name} raised in its {stage}: {type(error).__name__}") as caught:
            built(implementation)
        assert type(caught.value) is CaseFailed


def test_unsupported_is_for_builders_and_first_calls():
    def refuse(*_):
        raise Unsupported("no softcap")

    early, late = attention("early")(refuse), attention("late")(lambda _: refuse)
    for implementation in (early, late):
        with pytest.raises(Unsupported, match="no softcap"):
            built(implementation)
    with pytest.raises(CaseFailed, match="late: only a builder or a first call may raise Unsupported"):
        call(Case(W, late, "cpu"), refuse, inputs.plain(W, "cpu", 0))


def test_a_builder_must_return_a_kernel():
    with pytest.raises(CaseFailed, match="mine: its builder returned None, not a kernel"):
        built(attention("mine")(lambda _: None))


REGISTERS = '@attention("{}")\ndef {}(w):\n    return lambda q, k, v: q\n'
IMPORT = "from attn_impls import attention\n"


def test_load_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(IMPORT + REGISTERS.format("one", "f") + REGISTERS.format("two", "g"))
    before = set(REGISTRY)
    assert [i.name for i in load_file(path)] == ["one", "two"]
    assert set(REGISTRY) - before == {"one", "two"}
    assert REGISTRY["one"].source == str(path)
    assert built(REGISTRY["two"]).kernel(1, 2, 3) == 1


def test_two_files_of_one_name(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(IMPORT + REGISTERS.format(name, "f"))
    assert [load_file(str(tmp_path / name / "mine.py"))[0].name for name in ("one", "two")] == ["one", "two"]


BAD_FILES = {
    "absent": (None, "does not exist"),
    "syntax error": ("def broken(:\n", "SyntaxError"),
    "exits": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "missing library": ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
    "two-line error": ("raise RuntimeError('first line\\nsecond line')\n", "RuntimeError: first line"),
    "skips itself": ("import pytest\npytest.importorskip('no_such_module')\n", "no_such_module"),
    "registers nothing": ("x = 1\n", "registers nothing"),
    "fails late": (IMPORT + REGISTERS.format("mine", "f") + "1 / 0\n", "ZeroDivisionError"),
    "taken name": (IMPORT + REGISTERS.format("mine", "f") + REGISTERS.format("sdpa", "g"), "'sdpa' is registered twice"),
    "own name twice": (IMPORT + REGISTERS.format("mine", "f") + REGISTERS.format("mine", "g"), "'mine' is registered twice"),
    "bad name": (IMPORT + REGISTERS.format("a name", "f"), "'a name'"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_load_file_refuses(tmp_path, what):
    source, words = BAD_FILES[what]
    path = tmp_path / "mine.py"
    if source is not None:
        path.write_text(source)
    before = dict(REGISTRY)
    with pytest.raises((ValueError, pytest.skip.Exception), match="implementation file") as caught:
        load_file(path)
    assert repr(str(path)) in one_line(caught)
    assert words in one_line(caught)
    assert before == REGISTRY


def test_load_file_takes_python_only(tmp_path):
    path = tmp_path / "mine.cu"
    path.write_text("x = 1")
    with pytest.raises(ValueError, match=r"not a Python file: give one that ends in \.py"):
        load_file(path)


def test_an_installed_package_that_changes_a_setting_is_told_and_it_is_set_back(install):
    more = "import torch\ntorch.set_num_threads(torch.get_num_threads() + 1)\n"
    install("plug", {"plugged": "plug_sets:f"}, plug_sets=IMPORT + more + REGISTERS.format("plugged", "f"))
    before = settings.current()
    with pytest.warns(UserWarning, match=r"implementations changed the number of threads \(.*\) when imported; it is set back"):
        selection.resolve({option.name: [] if option.convert is None else option.default for option in OPTIONS})
    assert settings.current() == before


def test_entry_points(install):
    install("plug", {"plugged": "plug_ok:f"}, plug_ok=IMPORT + REGISTERS.format("plugged", "f"))
    assert discover()["plugged"].source.endswith("plug_ok.py")
    first = REGISTRY["plugged"]
    assert discover()["plugged"] is first  # again is harmless
    assert built(first).kernel(1, 2, 3) == 1


BAD_PLUGS = {
    "missing libcudart": ("raise ImportError('libcudart.so.12\\nand more')", "ImportError: libcudart.so.12"),
    "syntax error": ("def broken(:", "SyntaxError"),
    "exits": ("import sys; sys.exit('bye')", "SystemExit: bye"),
    "object is not there": ("x = 1", "AttributeError"),
    "fails late": (IMPORT + REGISTERS.format("plugged", "f") + "1 / 0", "ZeroDivisionError"),
    "taken name": (IMPORT + REGISTERS.format("plugged-too", "f") + REGISTERS.format("sdpa", "g"), "'sdpa' is registered twice"),
}


@pytest.mark.parametrize("what", BAD_PLUGS)
def test_a_broken_entry_point_costs_its_own_cases_only(install, what):
    source, clue = BAD_PLUGS[what]
    install("plug", {"plugged": "plug_bad:f"}, plug_bad=source)
    before = dict(REGISTRY)
    assert discover().items() >= before.items()
    assert set(REGISTRY) - set(before) == {"plugged"}
    assert REGISTRY["plugged"].unavailable("cpu") == ""  # it fails, rather than be skipped
    with pytest.raises(CaseFailed) as caught:
        built(REGISTRY["plugged"])
    first = str(caught.value).splitlines()[0]
    for words in ("'plugged'", "plug_bad:f", clue):
        assert words in first
    assert discover()["plugged"].unavailable("cpu") == ""  # again is harmless


def test_an_entry_point_cannot_hide_behind_a_built_ins_name(install):
    install("plug", {"sdpa": "plug_sdpa:f"}, plug_sdpa="raise ImportError('gone')")
    before = dict(REGISTRY)
    with pytest.warns(UserWarning, match=r"plug_sdpa:f.*gone"):
        discover()
    assert before == REGISTRY
