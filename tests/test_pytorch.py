"""Modules of PyTorch: in an environment of its own, by ``.ci/frameworks``."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_docs
from scipy import integrate

import sbml
from sbml.audit import continuous
from sbml.likelihood.ode import Solver
from sbml.score import from_prediction, pytorch
from sbml.score.divergence import Trace

pytestmark = pytest.mark.frameworks

SDE, EPS = sbml.RectifiedFlow(), 1e-3
X = np.random.default_rng(0).normal(size=(3, 1, 4, 4)).astype(np.float32)


@pytest.fixture(name="module", scope="module")
def _module():
    """A velocity of 4x4 images, with convolutions, a norm, dropout and a buffer."""
    import torch
    from torch import nn

    torch.manual_seed(0)

    class Velocity(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.5))
            self.inside = nn.Sequential(
                nn.Conv2d(2, 8, 3, padding=1),
                nn.GroupNorm(2, 8),
                nn.SiLU(),
                nn.Dropout(0.5),
                nn.Conv2d(8, 1, 3, padding=1),
            )

        def forward(self, x, t):
            time = t[:, None, None, None].expand_as(x)
            return x * time + self.scale * self.inside(torch.cat([x, time], 1))

    return Velocity()


def density(network, **options):
    score = from_prediction(network, "flow", SDE, batched=True)
    solver = Solver(rtol=1e-5, atol=1e-5, adjoint="reverse")
    return sbml.Density(score, SDE, X.shape[1:], **{"eps": EPS, "solver": solver, **options})


def truth(module, x):
    """log p_eps(x) by PyTorch and SciPy in float64, with the exact divergence."""
    import copy

    import torch

    double = copy.deepcopy(module).double().eval()

    def velocity(x, t):
        return double(x[None], t[None])[0]

    def rates(t, state):
        at, time = torch.tensor(state[:-1]).reshape(x.shape), torch.tensor(t)
        jacobian = torch.func.jacrev(lambda x: velocity(x, time))(at).reshape(x.size, x.size)
        return np.append(velocity(at, time).detach().numpy().ravel(), torch.trace(jacobian).item())

    solved = integrate.solve_ivp(
        rates, (EPS, 1.0), np.append(x.astype(float).ravel(), 0.0), rtol=1e-8, atol=1e-8
    )
    z, integral = solved.y[:-1, -1], solved.y[-1, -1]
    return -0.5 * np.sum(z**2 + np.log(2 * np.pi)) + integral


def test_a_module_that_is_no_network_says_how_to_make_one(module) -> None:
    with pytest.raises(ValueError, match="network is a module of PyTorch.*sbml.pytorch.network"):
        from_prediction(module, "flow", SDE, batched=True)


def test_outputs_are_pytorchs(module) -> None:
    import torch

    t = np.array([0.1, 0.5, 0.9], np.float32)
    with torch.no_grad():
        expected = module.eval()(torch.tensor(X), torch.tensor(t)).numpy()
    for network in (pytorch.network(module), pytorch.callback(module)):
        np.testing.assert_allclose(network(jnp.asarray(X), jnp.asarray(t)), expected, atol=1e-6)


def test_log_p_is_that_of_an_independent_solve(module) -> None:
    expected = [truth(module, x) for x in X]
    translated, called = density(pytorch.network(module)), density(pytorch.callback(module))
    np.testing.assert_allclose(translated.log_prob(X), expected, atol=1e-3)
    np.testing.assert_allclose(called.logp(X).values, expected, atol=1e-3)
    x, logp = translated.sample_and_log_prob(jax.random.key(0), 2)
    np.testing.assert_allclose(logp, [truth(module, np.asarray(row)) for row in x], atol=1e-3)


def test_gradients_with_respect_to_x_and_to_the_parameters(module) -> None:
    d = density(pytorch.network(module), solver=Solver(fixed_steps=8, adjoint="reverse"))

    @jax.jit
    def of_x(x):
        return d.log_prob(x)

    gradient, step = jax.grad(of_x)(jnp.asarray(X[0])), 1e-2
    direction = jnp.asarray(np.random.default_rng(1).normal(size=X[0].shape), jnp.float32)
    difference = (of_x(X[0] + step * direction) - of_x(X[0] - step * direction)) / (2 * step)
    assert float(jnp.sum(gradient * direction)) == pytest.approx(float(difference), rel=1e-2)
    whole = jax.grad(lambda d: d.log_prob(X).mean())(d)
    shapes = {leaf.shape for leaf in jax.tree.leaves(whole)}
    assert {(8, 2, 3, 3), (1, 8, 3, 3), (8,)} <= shapes


def test_the_blocks_of_the_documentation_run(module, capsys) -> None:
    """The last number in each block is the one that it prints."""
    for block in test_docs.NEEDS_TORCH:
        test_docs.execute(*block)
        expected = re.findall(r"-?\d+\.\d+", block[2])[-1]
        assert float(capsys.readouterr().out) == pytest.approx(float(expected), abs=1e-3)
    assert len(test_docs.NEEDS_TORCH) == 1


def test_probes_and_half_precision(module) -> None:
    import copy

    import torch

    probes, key = Trace("rademacher", 2), jax.random.key(0)
    translated, called = (
        density(make(module), trace=probes).log_prob(X, key)
        for make in (pytorch.network, pytorch.callback)
    )
    np.testing.assert_allclose(translated, called, atol=1e-3)
    half = copy.deepcopy(module).to(torch.bfloat16)
    with pytest.warns(UserWarning, match="weights of bfloat16 are evaluated in float32"):
        rounded = pytorch.network(half)
    expected = density(pytorch.network(copy.deepcopy(half).float())).log_prob(X)
    np.testing.assert_allclose(density(rounded).log_prob(X), expected, atol=1e-4)


def test_a_callback_says_where_gradients_come_from(module) -> None:
    d = density(pytorch.callback(module))
    with pytest.raises(ValueError, match="no gradient of log p.*use sbml.pytorch.network"):
        jax.grad(lambda x: d.log_prob(x).sum())(jnp.asarray(X))


def test_fields_of_the_audit_can_be_differentiated() -> None:
    torch = pytest.importorskip("torch")
    field = continuous.worlds("velocity")["mixture 2"]
    x = np.random.default_rng(0).normal(size=(3, 2))
    given = torch.tensor(x, requires_grad=True)
    found = field(given, torch.full((3,), 0.3, dtype=given.dtype))
    np.testing.assert_allclose(found.detach(), field(x, 0.3), rtol=1e-9)
    [slope] = torch.autograd.grad(found[:, 0].sum(), given)
    step = np.array([1e-5, 0])
    expected = (field(x + step, 0.3) - field(x - step, 0.3))[:, 0] / 2e-5
    np.testing.assert_allclose(slope[:, 0], expected, rtol=1e-6)
