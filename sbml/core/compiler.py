"""XLA for CPU computes sums wrongly in some versions: a flag that prevents this, and a check.

    jit(sum(f(x) + f(2 x)))        f = expm1, log1p, log

is wrong by 25 to 90% if XLA computes reductions with its YNNPACK library (the default in jaxlib
from 0.10.2 on). An XLA flag excludes reductions from that library. ``import sbml`` sets the flag,
which has an effect as long as no computation has started XLA. Before this package computes anything
on a CPU, :func:`check` compares the three sums with NumPy's, for every version and all flags.
"""

import functools
import mmap
import os
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

FLAG = "xla_cpu_experimental_ynn_fusion_type"
CURE = f"--{FLAG}=-reduce"
FIRST_WRONG = (0, 10, 2)  # of jaxlib
FUNCTIONS = ("expm1", "log1p", "log")


class MiscompilationError(RuntimeError):
    """XLA for CPU computes a sum wrongly, so no number of this process can be trusted."""


def version() -> str:
    """The version of jaxlib, which holds XLA."""
    return metadata.version("jaxlib")


def needs_cure(version: str) -> bool:
    """Whether the jaxlib of this ``version`` sums wrongly without the flag, as far as is known."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) >= FIRST_WRONG


@functools.cache
def knows(flag: str) -> bool:
    """Whether the installed XLA knows ``flag``; XLA aborts the process if it does not.

    jaxlib's largest library contains the names of the flags, each between two zero bytes.
    """
    import jaxlib

    files = pathlib.Path(jaxlib.__file__).parent.iterdir()
    libraries = [path for path in files if path.suffix in (".so", ".dylib", ".pyd", ".dll")]
    largest = max(libraries, key=lambda path: path.stat().st_size)
    with largest.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return text.find(b"\0" + flag.encode() + b"\0") >= 0


def with_flags(flags: str, *extra: str) -> str:
    """``flags``, a value of XLA_FLAGS, plus the ``extra`` flags that XLA knows and it lacks."""
    for option in extra:
        name = option.partition("=")[0]
        names = {flag.partition("=")[0] for flag in flags.split()}
        if name not in names and knows(name.removeprefix("--")):
            flags = f"{flags} {option}".strip()
    return flags


def cure() -> None:
    """Add the flag to XLA_FLAGS if this version of jaxlib needs it and knows it.

    XLA_FLAGS is not changed if the user has set the same flag, or if it names a file. The flag has
    no effect if XLA has already started: :func:`check` finds out whether the sums are right.
    """
    platforms, flags = os.environ.get("JAX_PLATFORMS", ""), os.environ.get("XLA_FLAGS", "").strip()
    if (platforms and "cpu" not in platforms) or (flags and not flags.startswith("-")):
        return
    if needs_cure(version()):
        os.environ["XLA_FLAGS"] = with_flags(flags, CURE)


def check() -> bool:
    """Compare three sums on this process's CPU with NumPy's, once in a process.

    It may be called anywhere, also while JAX traces. The result is True if the sums are right, and
    False if the platform of JAX's default device is an accelerator: then nothing is checked.

    Raises:
      MiscompilationError: if a sum is wrong, with jaxlib's version and the remedy.
    """
    import jax

    device = jax.config.jax_default_device
    platform = getattr(device, "platform", device) or jax.default_backend()
    if platform != "cpu":
        return False
    if (error := _error_of_cpu()) < 1e-5:
        return True
    raise MiscompilationError(
        f"XLA for CPU, in jaxlib {version()} with XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}, "
        f"computes sums that are wrong by {100 * error:.0f}%. Import sbml before anything computes "
        f"with JAX, without {FLAG} in XLA_FLAGS; or start the process with XLA_FLAGS={CURE}. If it "
        "still fails, install another version of jax and jaxlib"
    )


@functools.cache
def _error_of_cpu() -> float:
    """The largest relative error of the three sums on this process's CPU, measured once; NaN if one
    of them is NaN."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    cpu = jax.local_devices(backend="cpu")[0]
    # 4,096 is the smallest size at which YNNPACK computes reductions. It does not compute them in
    # one program of all three sums.
    x = np.linspace(0.1, 1.0, 4096, dtype=np.float32)

    def error(name: str) -> float:
        of_jax, of_numpy = getattr(jnp, name), getattr(np, name)
        with jax.default_device(cpu):
            total = jax.jit(lambda x: jnp.sum(of_jax(x) + of_jax(2 * x)))(x)
        exact = np.sum(of_numpy(x.astype(float)) + of_numpy(2 * x.astype(float)))
        return abs(float(total) / exact - 1)

    # A new thread has none of JAX's contexts, such as a trace, disable_jit or a transfer guard.
    # There is one for each sum, so that they are compiled side by side.
    with ThreadPoolExecutor(len(FUNCTIONS)) as threads:
        return float(np.max(list(threads.map(error, FUNCTIONS))))
