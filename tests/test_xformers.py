"""xFormers' two installation traps, on a stand-in that imports as the real one does."""

import sys
import types

import pytest

from attn_impls import xformers as adapter

FMHA = """
import importlib.util
if importlib.util.find_spec("flash_attn"):
    import flash_attn.flash_attn_interface
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Write a stand-in for xFormers and put it on the path; `failure` is what its extension failed with."""

    def write(failure="None"):
        (tmp_path / "xformers" / "ops").mkdir(parents=True)
        (tmp_path / "xformers" / "__init__.py").touch()
        (tmp_path / "xformers" / "ops" / "__init__.py").touch()
        (tmp_path / "xformers" / "ops" / "fmha.py").write_text(FMHA)
        (tmp_path / "xformers" / "_cpp_lib.py").write_text(f"_cpp_library_load_exception = {failure}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        del sys.modules[name]


@pytest.mark.parametrize("imported", [False, True], ids=["flash-attn-4 installed", "flash-attn-4 imported"])
def test_flash_attn_4_without_2_is_not_taken_for_it(fake, monkeypatch, tmp_path, imported):
    fake()
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)  # a namespace with nothing of flash-attn 2 in it
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    if imported:
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    before = sys.modules.get("flash_attn")
    assert adapter._import_fmha().__name__ == "xformers.ops.fmha"
    assert sys.modules.get("flash_attn") is before


def test_an_extension_that_did_not_load_is_loud(fake):
    fake(failure='RuntimeError("libcudart.so.12: cannot open shared object file")')
    with pytest.raises(ImportError, match=r"extension does not load: libcudart\.so\.12"):
        adapter._import_fmha()
