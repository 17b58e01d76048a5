"""Steps that train scores over the frozen weights of a module, through torch's autograd; see `popup`."""

from __future__ import annotations

from collections.abc import Callable

from sparselth.engine.autograd import AutogradNetwork, errors_named, mean_loss
from sparselth.engine.popup import PopupSteps
from sparselth.engine.state import Batch, never
from sparselth.streams import drawing_apart, number, seed_everything


class PopupModuleSteps(PopupSteps):
    """The steps of one job: its effective weights and their gradient are what the module's tensors view."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch, None)
        (self.job,) = batch.jobs
        self.module = AutogradNetwork(batch.model, self.job.who, self.flat, self.grad)

    def advance(self, step: int, steps: int, should_stop: Callable[[], bool]) -> int:
        taken, who, module, (row,) = 0, self.job.who, self.module, self.rows
        device = str(self.flat.device)
        module.net.train()
        with drawing_apart(device), errors_named(module.model, "training"):
            while taken < steps and not should_stop():
                now = step + taken
                if row.method.draws:
                    row.write(now)
                seed_everything(number(who.seed, who.arm, who.level, f"step/{now}", who.draw), device)
                x, y = self.batches.first(now)
                self.grad.zero_()
                mean_loss(module.model, module(x[0]), y[0]).backward()  # type: ignore[no-untyped-call]
                row.take(now, self.recipe.lr_at(now))
                taken += 1
        module.keep()
        self.take_statistics()
        return taken

    def measure(self, should_stop: Callable[[], bool] = never) -> tuple[list[float], list[float]]:
        (row,) = self.rows
        if row.method.draws:
            row.write()
        return self.module.measure(self.batch.data.validation_first(self.job.who.seed), should_stop)
