"""No two purposes share a key. All programs run with one seed, and their keys are recorded.

JAX's ``split(key, n)[i]`` equals ``fold_in(key, i)``. So by mistake, the key of one purpose could
be a key that another purpose derives or uses for its draws.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

import sbml
from sbml.core import streams
from sbml.density.estimators import Cell
from sbml.program.config import build, objective
from sbml.program.config.trained import Trained
from sbml.program.evaluation import levels, samples
from sbml.program.evaluation.cells import Evaluation, check_first_batch, run_of
from sbml.program.modes import latents, train, train_dequantizer
from sbml.program.runtime.state import TrainState
from sbml.program.runtime.workdir import Workdir
from sbml.sdes import VP

DRAWS = ("normal", "uniform", "rademacher", "permutation", "truncated_normal")
ROOT = (0, 0)  # The key of the seed 0.
COUNTERS = 2**20  # Numbers below it are counters, such as those of steps.


class Record:
    """The keys that a program has used.

    Attributes:
      draws: for each key, the functions and shapes of its draws. A repeated draw counts once.
      parents: for each key, whether it was split, or counters or names were folded into it.
    """

    def __init__(self):
        self.draws, self.parents = {}, {}

    @property
    def keys(self):
        return (set(self.draws) | set(self.parents)) - {ROOT}

    def note(self, table, use, data):
        """Add ``use`` to the uses of the keys whose data are ``data (..., 2)``."""
        for key in map(tuple, np.asarray(data).reshape(-1, 2).tolist()):
            getattr(self, table).setdefault(key, set()).add(use)


def watched(name, function, inside, current):
    """``function`` of ``jax.random``, which notes its keys in the record ``current[-1]``."""

    def call(key, *arguments, **options):
        shape = arguments[0] if name != "permutation" and arguments else ()
        if name in DRAWS:
            table, use = "draws", f"{name} {shape}"
        else:
            counter = isinstance(shape, jax.Array) or (name == "fold_in" and shape < COUNTERS)
            table, use = "parents", "split" if name == "split" else ("name", "counter")[counter]
        if not inside:  # Calls from other functions of JAX do not count.
            data = jax.random.key_data(key)
            jax.debug.callback(lambda data: current[-1].note(table, use, data), data)
        inside.append(name)
        try:
            return function(key, *arguments, **options)
        finally:
            inside.pop()

    return call


def config():
    """A config with three training steps, and three sweeps over four images in one batch."""
    made = tiny.get_config()
    made.training.update(num_steps=3, noises="independent")
    made.dequantizer.training.update(batch_size=64, num_steps=3, log_every=1)
    made.eval.update(max_images=4, batch_size=4)
    made.eval.bound.update(sweeps=3, control=False, proposal_bins=0)
    made.eval.ode.subset = 4
    made.sampling.sampler.update(name="reverse_diffusion", steps=3)
    made.sampling.corrector.name = "langevin"
    return made


def shared(workdir, **fields):
    made = config()
    made.eval.update(fields)
    e = build.Experiment(made)
    trained = Trained(e, e.restore(workdir), Workdir(workdir))
    return Evaluation(trained, e.images("test"), e.images("train"))


def density(method):
    score = sbml.Density(lambda x, t, key: -x, VP(), (64, 2), eps=1e-3)
    return lambda workdir: getattr(score, method)(np.zeros((4, 64, 2), np.float32))


def evaluation(workdir):
    evaluated = shared(workdir)
    found = evaluated.dequantization("uniform")
    run_of(evaluated, Cell("bound", "uniform"), found).measurement.estimate()


def noise_levels(workdir):
    evaluated = shared(workdir, bound={"level_images": 4})
    found = evaluated.dequantization("uniform")
    levels.measure(run_of(evaluated, Cell("bound", "uniform"), found))


def first_batch(workdir):
    evaluated = shared(workdir)
    check_first_batch(evaluated, evaluated.dequantization("uniform"))


def sampling(workdir):
    e = build.Experiment(config())
    samples.preview(e, e.restore(workdir).state.ema_params, 4)


def completing(workdir):
    made = config()
    made.latents.update(steps=2)
    e = build.Experiment(made)
    score, x = e.adapter(e.restore(workdir).state.ema_params), jnp.zeros((4, 8, 8, 1))
    options = {"sde": e.sde, "eps": 1e-3, "sampler": e.config.latents.sampler(), "colours": False}
    latents.completions(score, x, **options)


def dequantizing(workdir):
    """The training of a dequantizer, with another loss and one parameter, because a flow takes long
    to compile."""

    def init(experiment, images):
        return TrainState.create({"w": jnp.zeros(())}, experiment.dequantizer_optimizer)

    def loss_fn(experiment):
        return lambda params, draws, frozen: params["w"] + jnp.zeros(len(draws[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build.Experiment, "init_dequantizer", init)
        patch.setattr(train_dequantizer, "loss_fn", loss_fn)
        runs.mode(train_dequantizer.run, config(), workdir)


PROGRAMS = {
    "train": lambda workdir: runs.mode(train.run, config(), workdir),
    "train_dequantizer": dequantizing,
    "pilot": lambda workdir: shared(workdir, bound={"proposal_bins": 32}).reduction(1e-3).density,
    "noise levels": noise_levels,
    "bound": evaluation,
    "first batch": first_batch,
    "samples": sampling,
    "completions": completing,
}
# Methods of ``Density``. Its ``bound`` has the purposes of "pilot" and "bound" above.
OF_DENSITY = ("logp", "bound")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The record of each program.

    A function that was compiled for one program notes its keys also when a later program calls it.
    """
    workdir, found, inside = tmp_path_factory.mktemp("streams"), {}, []
    programs = {**PROGRAMS, **{f"Density.{name}": density(name) for name in OF_DENSITY}}
    current = [Record()]
    with pytest.MonkeyPatch.context() as patch:
        for name in (*DRAWS, "split", "fold_in"):
            function = watched(name, getattr(jax.random, name), inside, current)
            patch.setattr(jax.random, name, function)
        for name, program in programs.items():
            found[name] = Record()
            current.append(found[name])
            program(workdir)
            jax.effects_barrier()
    return found


def test_the_code_of_a_name_is_neither_that_of_another_name_nor_a_counter():
    codes = list(streams.CODES.values())
    assert len(set(codes)) == len(codes) and min(codes) > COUNTERS


@pytest.mark.parametrize(
    ("mode", "last"), [(objective, "rows"), (train_dequantizer, "bound")], ids=["score", "flow"]
)
def test_each_purpose_of_a_step_has_a_stream_of_its_own(mode, last, monkeypatch):
    """No name is folded twice into one key of the draws of a batch, and no key is split twice."""
    used, kept, fold_in, split = [], [], jax.random.fold_in, jax.random.split

    def folding(key, number):
        kept.append(key)
        used.append((id(key), number))
        return fold_in(key, number)

    def splitting(key, n):
        kept.append(key)
        used.append((id(key), "split"))
        return split(key, n)

    prepare = mode.prepare_fn(build.Experiment(config()))
    monkeypatch.setattr(jax.random, "fold_in", folding)
    monkeypatch.setattr(jax.random, "split", splitting)
    key, pixels = jax.random.key(0), np.zeros((8, 8, 8, 1), np.uint8)
    jax.eval_shape(prepare, pixels, key, np.ones((2, 32), np.float32))
    assert len(used) == len(set(used))
    names = {streams.CODES[name] for name in ("dequantization", "times", last)}
    assert names == {number for at, number in used if at == used[0][0]}


@pytest.mark.slow
def test_no_two_purposes_share_a_key(records):
    names = [*PROGRAMS, "Density.bound"]
    for one, other in itertools.combinations(names, 2):
        # ``Density.bound`` has the same pilot and sweeps as an evaluation.
        if {one, other} not in ({"bound", "Density.bound"}, {"pilot", "Density.bound"}):
            assert not records[one].keys & records[other].keys, (one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PROGRAMS, *(f"Density.{name}" for name in OF_DENSITY)])
def test_a_key_has_one_use(records, name):
    """A key serves for one kind of draw, or is split, or counters or names are folded into it."""
    record = records[name]
    assert len(record.draws) > 3
    assert not set(record.draws) & set(record.parents)
    uses = {**record.draws, **{k: v for k, v in record.parents.items() if k != ROOT}}
    assert {key: use for key, use in uses.items() if len(use) > 1} == {}
