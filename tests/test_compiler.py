"""A flag corrects the sums that XLA for CPU computes wrongly; without it they are an error.

The tests start processes of their own, since a process starts XLA only once.
"""

import os
import subprocess
import sys

import pytest
import runs

from sbml.core import compiler

BROKEN = f"--{compiler.FLAG}=+reduce"  # YNNPACK for reductions, the default of some versions

# Whether this version sums wrongly with the flags of the process, computed without sbml.
WRONG = """
import re
import jax, jax.numpy as jnp, numpy as np
x = np.random.default_rng(0).uniform(0.1, 1, 10_000).astype(np.float32)
total = jax.jit(lambda x: jnp.sum(jnp.log(x) + jnp.log(2 * x)))(x)
wrong = not np.isclose(total, np.sum(2 * np.log(x.astype(float)) + np.log(2)), rtol=1e-4)
"""

# One call of each function that computes numbers. Each raises an error or returns a value.
CALLS = """
import jax, jax.numpy as jnp, numpy as np, sbml
from sbml import bound, compiler, dequantizers, discrete, divergence, integers, likelihood, losses
from sbml import networks, ode, samplers, sdes, times
from sbml.score import Adapter, from_prediction
sde, key, x = sdes.VP(), jax.random.key(0), jnp.ones((4, 4, 1))
t, k = jnp.asarray(0.5), jnp.zeros((4, 4, 1), jnp.uint8)
score = lambda x, t, key: -x
flow = dequantizers.DEQUANTIZERS["variational"](filters=4, components=2, blocks=1, heads=1)
control = bound.GaussianControl(jnp.zeros(16), jnp.ones(16), None)
def density():
    return sbml.Density(score, sde, (4, 4, 1))

network = networks.NETWORKS["mlp"](width=4, depth=1)
def zeros_of(init):
    return jax.tree.map(lambda a: jnp.zeros(a.shape), jax.eval_shape(init))

def shapes_of(name, **sizes):
    init = networks.NETWORKS[name](**sizes).init
    return jax.eval_shape(lambda: init(key, x[None], t[None], train=False))

check, compiler.check = compiler.check, lambda: True  # Shapes of parameters need no sums.
zeros = zeros_of(lambda: network.init(key, x[None], t[None], train=False)["params"])
of_flow = zeros_of(lambda: flow.init(key, k[None].repeat(2, 0)))
compiler.check = check
calls = {
    "losses.dsm": lambda: losses.dsm(score, sde, x, t, key),
    "losses.dsm_batch": lambda: losses.dsm_batch(score, sde, x[None], t[None], key[None]),
    "bound.elbo": lambda: bound.elbo(score, sde, x, key, eps=1e-3, u=t[None]),
    "discrete.elbo": lambda: discrete.elbo(
        score, sde, k, key, noise=discrete.Categorical(2), eps=1e-3, u=t[None]
    ),
    "likelihood.ode_logp": lambda: likelihood.ode_logp(score, sde, x, key, eps=1e-3),
    "ode.flow": lambda: ode.flow(score, sde, x, 1e-3, 1.0, ode.Solver()),
    "ode.solve": lambda: ode.solve(lambda t, x: x, x, 0.1, 1.0, ode.Solver()),
    "samplers.DDIM": lambda: samplers.DDIM(steps=2)(score, sde, x, key, eps=1e-3),
    "samplers.denoise": lambda: samplers.denoise(score, sde, x, t),
    "divergence.exact": lambda: divergence.exact(lambda x: x, x),
    "sde.prior_logp": lambda: sde.prior_logp(x),
    "sde.std": lambda: sdes.SubVP().std(t),
    "sde.rate": lambda: sde.rate(t),
    "sde.time": lambda: sde.time(t),
    "sde.log_snr": lambda: sdes.LinearVE().log_snr(t),
    "sde.levels": lambda: sdes.VP().levels(50).log_snr(t),
    "losses.weight": lambda: losses.weight(sde, t, "likelihood"),
    "times.Importance": lambda: times.Importance(sde, 1e-3).at(t),
    "bound.prior_kl": lambda: bound.prior_kl(sdes.VE(), x),
    "bound.GaussianControl": lambda: control.integral(sdes.VE(), x, 1e-3),
    "discrete.decoder_nats": lambda: discrete.decoder_nats(x, k, 2, t),
    "losses.dsm_batch": lambda: losses.dsm_batch(score, sde, x[None], t[None], key[None]),
    "integers.posterior_mean": lambda: integers.posterior_mean(
        jnp.zeros((4, 4, 1, 2)), x, t, 2, "centre"
    ),
    "integers.decoder_nats": lambda: integers.decoder_nats(jnp.zeros((4, 4, 1, 2)), x, t, k, 2),
    "score.from_prediction": lambda: from_prediction(lambda x, t: x, "x0", sde)(x, t, None),
    "Density.logp": lambda: density().logp(np.ones((1, 4, 4, 1))),
    "Density.bound": lambda: density().bound(np.ones((1, 4, 4, 1))),
    "Density.sample": lambda: density().sample(key, 2),
    "truncated_normal": lambda: dequantizers.DEQUANTIZERS["truncated_normal"]().sample({}, k, key),
    "variational": lambda: flow.sample(of_flow, k, key),
    "times.warp": lambda: times.warp(jnp.zeros(3), jnp.ones(4)),
    "times.with_floor": lambda: times.with_floor(jnp.ones(4)),
    "times.tally": lambda: times.tally(jnp.zeros((2, 4)), jnp.zeros(3), jnp.ones(3), 0.9),
    "mlp": lambda: network.apply({"params": zeros}, x[None], t[None], train=False),
    "ncsnpp": lambda: shapes_of("ncsnpp", nf=8, ch_mult=(1,), num_res_blocks=1),
    "vdm": lambda: shapes_of("vdm", width=8, depth=1),
    "score.Adapter": lambda: Adapter(network, sde)(zeros)(x, t, None),
}
silent = []
for name, call in calls.items() if wrong else ():
    for wrapped in (call, lambda: jax.jit(call)()):
        if wrapped is not call and name.startswith("Density"):
            continue  # Its arguments and results are NumPy's arrays.
        try:
            wrapped()
            silent.append(name)
        except compiler.MiscompilationError as error:
            message = str(error)
if wrong:
    assert not silent, f"computed without an error: {silent}"
    assert "jaxlib " + compiler.version() in message and compiler.CURE in message
    assert re.search(r"wrong by \\d+%", message)
else:
    assert compiler.check() and jnp.isfinite(calls["losses.dsm"]())
"""


def in_process(code: str, flags: str = "") -> None:
    """Run ``code`` in a process that is started with XLA_FLAGS=``flags``."""
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-4000:]


CONTEXTS = """
from jax.sharding import Mesh, PartitionSpec
from sbml import compiler

def sharded():
    mesh = Mesh(np.array(jax.devices()), ("a",))
    spec = PartitionSpec("a")
    return jax.shard_map(traced, mesh=mesh, in_specs=spec, out_specs=spec)(jnp.ones(2))

def traced(x):
    compiler.check()
    return x

def within(context):
    with context:
        return compiler.check()

for call in (
    lambda: within(jax.disable_jit()),
    lambda: within(jax.transfer_guard("disallow")),
    lambda: jax.jit(jax.vmap(traced))(jnp.ones(2)),
    lambda: jax.grad(lambda x: traced(x))(1.0),
    sharded,
):
    compiler._error_of_cpu.cache_clear()
    try:
        call()
        assert not wrong
    except compiler.MiscompilationError:
        assert wrong
"""

can_break = pytest.mark.skipif(
    not compiler.knows(compiler.FLAG), reason="this XLA has no such fusion to switch on"
)


@pytest.mark.slow
@can_break
def test_no_entry_point_of_the_library_computes_on_a_broken_compiler() -> None:
    """A flag that the user has set is not changed, so every entry point raises an error."""
    in_process(WRONG + CALLS + CONTEXTS, BROKEN)


@pytest.mark.slow
def test_sums_are_right_once_the_package_is_imported() -> None:
    in_process("import sbml\n" + WRONG + "assert not wrong\n" + CALLS + CONTEXTS)


@pytest.mark.slow
def test_a_computation_before_the_import_is_noticed() -> None:
    """With its default flags, the installed version may sum rightly or wrongly."""
    in_process(WRONG + CALLS)


@can_break
@pytest.mark.skipif(
    not compiler.needs_cure(compiler.version()), reason="this XLA is right without the flag"
)
@pytest.mark.parametrize("mode", [pytest.param("verify", marks=pytest.mark.slow), "train"])
def test_the_program_stops_before_any_work(mode: str, tmp_path) -> None:
    needed = (tmp_path / "run", "tests/tiny.py") if mode == "train" else (None, "")
    process = runs.start(needed[0], f"--mode={mode}", config=needed[1], env={"XLA_FLAGS": BROKEN})
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "MiscompilationError" in err and compiler.CURE in err
    assert not list(tmp_path.rglob("checkpoints"))
    assert "agree" not in out


def test_the_cure_keeps_the_flags_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)

    def cured(flags: str | None) -> str | None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
        if flags is not None:
            monkeypatch.setenv("XLA_FLAGS", flags)
        compiler.cure()
        return os.environ.get("XLA_FLAGS")

    monkeypatch.setattr(compiler, "version", lambda: "0.12.0.1")
    assert cured(None) == cured("") == compiler.CURE
    other = "--xla_force_host_platform_device_count=2"
    assert cured(other) == f"{other} {compiler.CURE}"
    assert cured(f"{BROKEN} {other}") == f"{BROKEN} {other}"
    assert cured("flags.txt") == "flags.txt"  # XLA reads its flags from this file.
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    assert cured(other) == other
    monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
    assert cured(None) == compiler.CURE
    monkeypatch.setattr(compiler, "version", lambda: "0.10.1")
    assert cured(other) == other
    monkeypatch.setattr(compiler, "version", lambda: "built from source")
    assert cured(other) == other
    for later in ("0.13.0", "0.12.0rc1", "0.10.2+cuda12"):
        monkeypatch.setattr(compiler, "version", lambda later=later: later)
        assert cured(None) == compiler.CURE
    monkeypatch.setattr(compiler, "knows", lambda flag: False)
    assert cured(other) == other


@pytest.mark.slow
def test_flags_that_xla_does_not_know_are_left_out() -> None:
    """XLA aborts a process that starts with such a flag."""
    unknown = "--xla_cpu_fuse_everything=true"
    assert compiler.with_flags("", unknown, compiler.CURE) == compiler.CURE
    for flag in (unknown, "--xla_cpu_use_fusion_emitters=false", compiler.CURE):
        environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
        code = "import jax; jax.devices()"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        knows = compiler.knows(flag.removeprefix("--").partition("=")[0])
        assert knows == (done.returncode == 0), flag
        assert knows or b"Unknown flag" in done.stderr
