"""``config.optim`` and ``config.dequantizer.optim``: the paper's optimizer, or Muon.

The paper's is Adam with clipping by the global norm and linear warm-up,

learning rate at step n = lr min(n / warmup, 1)

Muon (Jordan et al. 2024) replaces Adam's step for an m x n matrix by an orthogonal one. If U S V^T
is the average of its gradients, the step is about lr .2 sqrt(max(m, n)) U V^T, whose entries have
the root mean square .2 lr, as Adam's usually have. The other parameters take the steps of Adam
with Nesterov's momentum.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import jax
from absl import logging

from sbml.core.scalars import notation
from sbml.core.types import Array, PyTree
from sbml.program.config.fields import Natural, Section, among, field, refusal

if TYPE_CHECKING:  # Otherwise the functions import it, because --help does not need it.
    import optax

# The program warns if the initial parameters weigh more than this in the averaged ones.
MOST_INITIAL = 0.2
# The names of the kernels of all networks.
KERNELS = ("kernel", "W", "weight")


class Optim(Section):
    """The optimizer of ``--mode=train``, and the average of the parameters.

    Adam changes each parameter by about the learning rate in a step, so rates above 1 are of no use
    and not allowed.
    """

    section: ClassVar[str] = "optim"

    name: Annotated[str, among(("adam", "muon"))] = field(
        "adam", "muon: orthogonal steps for the kernels inside blocks, and Adam's for the rest"
    )
    lr: float = field(2e-4, "largest learning rate", gt=0, le=1)
    warmup: Natural = field(5_000, "number of steps in which the rate rises from 0 to lr")
    schedule: Annotated[str, among(("constant", "cosine"))] = field(
        "constant", "the learning rate after the warm-up; cosine: it falls to zero at num_steps"
    )
    beta1: float = field(
        0.9, "decay of the gradient's average per step; Muon's own is 0.95", ge=0, lt=1
    )
    beta2: float = field(0.999, "decay of the squared gradient's average per step", ge=0, lt=1)
    eps: float = field(1e-8, "added to the root of the second moment", ge=1e-30, le=1)
    weight_decay: float = field(
        0.0,
        "decoupled weight decay (AdamW): each step also subtracts learning rate * weight_decay * "
        "parameter from the parameter; 0: off",
        ge=0,
        le=10,
    )
    grad_clip: float = field(
        1.0,
        "largest global norm of the gradient of the paper's loss, which is a mean over the "
        "dimensions of an image for the score, and a sum for the dequantizer; 0: off, or else at "
        "least 10^4 eps",
        ge=0,
        le=1e9,
    )
    ema: float = field(0.9999, "decay of the parameters' average per step", ge=0, lt=1)

    def check(self) -> None:
        """Check that ``eps`` does not hide the clipped gradient. If its norm is spread evenly over
        10^8 parameters, each entry is 10^-4 of the norm, and Adam's step is |g| / (|g| + eps) of
        the rate."""
        if 0 < self.grad_clip < 1e4 * self.eps:
            needs = f"0, which is off, or at least 1e4 * {self.name_of('eps')}: Adam's steps vanish"
            raise refusal(self.name_of("grad_clip"), self.grad_clip, f"{needs} below it")

    def warn_if_short(self, num_steps: int) -> None:
        """Log warnings if a run of ``num_steps`` does not fit the warm-up or the average."""
        run = f"in a run of {num_steps} steps"
        if num_steps <= self.warmup:
            last = notation(self.lr * num_steps / self.warmup, "g")
            logging.warning(
                f"{self.section}.warmup={self.warmup} {run}: the learning rate only rises, to "
                f"{last}; set --config.{self.section}.warmup={num_steps // 10}"
            )
        if (initial := self.ema**num_steps) > MOST_INITIAL:
            ema = max(0.0, 1 - 6.5 / num_steps)
            logging.warning(
                f"{self.section}.ema={self.ema:g} {run}: initial values have a weight of "
                f"{initial:.0%} in the averaged parameters, which are evaluated and sampled; set "
                f"--config.{self.section}.ema={ema:.7g}"
            )

    def rate(self, num_steps: int) -> "optax.Schedule":
        """The learning rate by step in a run of ``num_steps``.

        If ``num_steps`` is not above ``warmup``, the run ends before a cosine begins.
        """
        import optax

        if self.schedule == "cosine" and self.warmup < num_steps:
            return optax.warmup_cosine_decay_schedule(0.0, self.lr, self.warmup, num_steps)
        if self.warmup:
            return optax.linear_schedule(0.0, self.lr, self.warmup)
        return optax.constant_schedule(self.lr)

    def transformation(self, num_steps: int, unit: float) -> "optax.GradientTransformation":
        """The optimizer of a run of ``num_steps``: clipping, Adam or Muon, decoupled weight decay.

        ``unit`` is the value of the loss here when the paper's loss is 1. The norm is clipped at
        ``grad_clip * unit``, which equals clipping the paper's gradient at ``grad_clip``. Only
        matrices and kernels decay; biases, scales of norms, position embeddings (these may have as
        many axes as an image) and the fixed Fourier frequencies do not.
        """

        import optax

        def decayed(path: jax.tree_util.KeyPath, update: Array, param: Array) -> Array:
            name = str(getattr(path[-1], "key", ""))
            if param.ndim < 2 or name.startswith(("scale", "bias", "pos_emb")):
                return update
            return update + self.weight_decay * param

        def decay(updates: optax.Updates, params: optax.Params) -> optax.Updates:
            return jax.tree_util.tree_map_with_path(decayed, updates, params)

        # The state's structure depends on the name alone: a run can continue with other settings.
        clip = self.grad_clip * unit
        if self.name == "muon":
            step = optax.contrib.muon(
                learning_rate=-1.0,  # the last transformation has the rate, and changes the sign
                eps=self.eps,
                adam_b1=self.beta1,
                adam_b2=self.beta2,
                muon_weight_dimension_numbers=muon_dimensions,
                consistent_rms=0.2,
            )
        else:
            step = optax.scale_by_adam(self.beta1, self.beta2, self.eps)
        return optax.chain(
            optax.clip_by_global_norm(clip) if clip else optax.identity(),
            step,
            optax.stateless(decay) if self.weight_decay else optax.identity(),
            optax.scale_by_learning_rate(self.rate(num_steps)),
        )


def muon_dimensions(params: PyTree) -> PyTree:
    """The axes of every kernel that Muon changes, and None for all other parameters.

    A kernel (h, w, in, out) is a matrix (h w in) x out. Those of the network itself, which are
    outside its blocks, stay with Adam: they map from the image and the label, and to the output,
    where steps of equal size in all directions do not suit. So do embeddings and vectors.

    Raises:
      ValueError: no parameter is a kernel inside a block.
    """
    import optax

    def of(path: jax.tree_util.KeyPath, param: Array) -> Any:
        if len(path) < 3 or param.ndim < 2 or getattr(path[-1], "key", "") not in KERNELS:
            return None
        last = param.ndim - 1
        return optax.contrib.MuonDimensionNumbers(tuple(range(last)), last)

    dimensions = jax.tree_util.tree_map_with_path(of, params)
    if not jax.tree.leaves(dimensions):
        raise ValueError("optim.name=muon: the network has no kernels inside blocks; give adam")
    return dimensions


class DequantizerOptim(Optim):
    """The optimizer of the dequantizer, with a faster average than the score's."""

    section: ClassVar[str] = "dequantizer.optim"

    name: Annotated[str, among(("adam",))] = field("adam", "the optimizer")
    ema: float = field(0.99, "decay of the parameters' average per step", ge=0, lt=1)
