"""Sources of implementations that fail, each in its own way, and what is to be said of it."""

import textwrap

HEAD = '''
import ctypes, functools, os, signal, sys, time
import torch
from torch.nn.functional import scaled_dot_product_attention
from attn_impls import Unsupported, attention

def right(w):
    return functools.partial(scaled_dot_product_attention, is_causal=w.causal, enable_gqa=w.group > 1)

def in_rounds():
    """Whether pytest-benchmark's rounds are what calls."""
    frame = sys._getframe()
    while frame and "pedantic" not in frame.f_code.co_name:
        frame = frame.f_back
    return frame is not None

calls = 0

def third_round():
    """Whether this is the third of the rounds that pytest-benchmark calls: of the timed ones the second."""
    global calls
    time.sleep(0.002)  # long enough for one call a round
    calls += in_rounds()
    return in_rounds() and calls == 3

left, seen = [], set()

def last_or_this(out):
    """An output, or in rounds the one before it."""
    time.sleep(0.002)  # long enough for one call a round
    left.append(out)
    return left[-2] if in_rounds() else out

def must(fail):
    raise fail
'''

# name: (what its kernel returns, what is said of it)
WRONG_KERNELS = {
    "garbage": ("torch.randn_like(q)", "differs from the float64 oracle"),
    "scaled": ("right(w)(q * 1.02, k, v)", "differs from the float64 oracle"),
    "zeros": ("torch.zeros_like(q)", "differs from the float64 oracle"),
    "nan": ("torch.full_like(q, float('nan'))", "returned NaN"),
    "one_nan": ("right(w)(q, k, v).index_put_([torch.tensor([0])] * 4, torch.tensor(float('nan')))", "returned NaN in 1 of"),
    "infinite": ("right(w)(q, k, v) / 0", "differs from the float64 oracle"),
    "shape": ("right(w)(q, k, v)[:, :, 1:]", "returned shape (1, 2, 3"),
    "dtype": ("right(w)(q, k, v).double()", "returned dtype torch.float64, expected torch.float32"),
    "device": ("right(w)(q, k, v).to('meta')", "returned device meta, expected cpu"),
    "sparse": ("right(w)(q, k, v).to_sparse()", "returned a tensor of torch.sparse_coo, expected a dense one"),
    "pair": ("(right(w)(q, k, v), None)", "returned tuple, not a tensor"),
    "nothing": ("None", "returned NoneType, not a tensor"),
    "mutates": ("(right(w)(q, k, v), k.zero_())[0]", "changed its input k"),
    "mutates_in_rounds": ("(right(w)(q, k, v), in_rounds() and k.zero_())[0]", "changed its input k while it was timed"),
    "zeros_in_rounds": (
        "right(w)(q, k, v) * (not in_rounds())",
        "differs from the float64 oracle in 4 of 4 rounds, warm-up included (first: round 1): its worst row errs ",
    ),
    "left_over": (
        "last_or_this(right(w)(q, k, v))",
        "differs from the float64 oracle in 4 of 4 rounds, warm-up included (first: round 1): its worst row errs ",
    ),
    "changes_settings": (
        "(right(w)(q, k, v), torch.set_grad_enabled(False))[0]",
        "changed whether gradients are recorded (True → False) for everybody in its kernel: set it back there",
    ),
    "wrong_at_first": (
        "seen.add(w) or q * 0 if w not in seen else right(w)(q, k, v)",
        "differs from the float64 oracle in its first call alone: its worst row errs ",
    ),
    "spoils_and_raises": (
        "(k.zero_(), must(OSError('spoilt'))) if in_rounds() else right(w)(q, k, v)",
        "raised in its kernel: OSError: spoilt",
    ),
    "raises": ("must(RuntimeError('boom\\n' * 200))", "raised in its kernel: RuntimeError: boom"),
    "raises_in_round": (
        "must(OSError('late')) if third_round() else right(w)(q, k, v)",
        "raised in its kernel: OSError: late",
    ),
    "out_of_memory": (
        "must(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 64.00 GiB. GPU 0 has a total capacity of 79.18 GiB"
        " of which 2.71 GiB is free. Including non-PyTorch memory, this process has 76.46 GiB memory in use.'))",
        "ran out of memory in its kernel: tried to allocate 64.00 GiB, of 79.18 GiB 2.71 GiB were free",
    ),
    "unsupported_late": (
        "must(Unsupported('not today')) if in_rounds() else right(w)(q, k, v)",
        "only a builder or a first call may raise Unsupported, not a later one: not today",
    ),
    "exits": ("sys.exit(0)", "raised in its kernel: SystemExit"),
    "recurses": ("(f := lambda: f())()", "raised in its kernel: RecursionError"),
}
# name: (what its builder returns, what is said of it)
WRONG_BUILDERS = {
    "builds_nothing": ("None", "its builder returned None"),
    "builder_raises": ("must(ZeroDivisionError('bang'))", "raised in its builder: ZeroDivisionError: bang"),
    "builder_out_of_memory": ("must(torch.OutOfMemoryError('no room'))", "ran out of memory in its builder"),
    "builder_changes_settings": (
        "(torch.set_num_threads(torch.get_num_threads() + 1), right(w))[1]",
        "changed the number of threads (1 → 2) for everybody in its builder",
    ),
    "builder_exits": ("sys.exit('bye')", "raised in its builder: SystemExit: bye"),
    "builder_imports": ("__import__('a_library_that_nobody_has')", "raised in its builder: ModuleNotFoundError"),
}
BAD = WRONG_KERNELS | WRONG_BUILDERS
BROKEN = ('"broken", dist=["no-such-dist", "pytest"], install="pip install pytest"', "__import__('a_library_that_nobody_has')")
ABSENT = ('"absent", dist="no-such-dist", install="pip install no-such-dist"', "None")
UNABLE = ('"unable"', "must(Unsupported('no odd lengths')) if w.q_len % 2 else right(w)")


def source(*registered):
    """A file of implementations, each given as the decorator's arguments and the builder's value."""
    texts = [f"@attention({arguments})\ndef _(w):\n    return {value}\n" for arguments, value in registered]
    return textwrap.dedent(HEAD) + "\n".join(texts)


def kernel(value):
    return f"lambda q, k, v: {value}"


ALL = [(f'"{name}"', kernel(value)) for name, (value, _) in WRONG_KERNELS.items()]
ALL += [(f'"{name}"', value) for name, (value, _) in WRONG_BUILDERS.items()]
