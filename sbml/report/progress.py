"""The progress of a training, from its metrics, its checkpoints and its lock."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far the training of a work directory has come.

    Attributes:
      owner: the process that is training at this moment, in words; None if there is none.
      step: the last step in the metrics or of a checkpoint; None if there is neither.
      num_steps: the number of steps that the config asks for.
      loss: the last logged loss, in nats per dimension; None if there is none.
      checkpoint: the step of the newest checkpoint; None if there is none.
    """

    owner: str | None
    step: int | None
    num_steps: int
    loss: float | None
    checkpoint: int | None

    @property
    def line(self) -> str:
        """The progress in words, for the terminal and for the page."""
        return ", ".join(part for part in (self._state, self._reached, self._loss) if part)

    @property
    def _state(self) -> str:
        if self.owner is not None:
            return "training in progress"
        if self.step is None:
            return "not trained yet"
        return "training complete" if self._saved >= self.num_steps else "training stopped"

    @property
    def _reached(self) -> str:
        if self.step is None:
            return ""
        if self.step > self.num_steps:  # The config may be that of an earlier, shorter training.
            return f"step {self.step:,}"
        reached = f"step {self.step:,} of {self.num_steps:,}"
        if self.owner is None and self._saved < self.step == self.num_steps:
            saved = f"saved up to step {self._saved:,}" if self._saved else "no checkpoint"
            return f"{reached}, {saved}"
        return reached

    @property
    def _saved(self) -> int:
        return self.checkpoint or 0

    @property
    def _loss(self) -> str:
        return "no loss logged yet" if self.loss is None else f"last loss {self.loss:.4f}"

    def plain(self) -> dict[str, Any]:
        """The fields and the line, as ``report.json`` has them."""
        return {"line": self.line, **dataclasses.asdict(self)}
