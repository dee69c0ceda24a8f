"""What Lightning shows of a run, shorter: one line for the size of a model, bars without a part of the run's name."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import ModelSummary, ProgressBar, RichModelSummary, RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count


class _SizeOfModel(ModelSummary):
    """Says how many parameters a model has and trains.

    Lightning's table has a row for each child of the module, and the floating-point operations of a forward pass, which
    it does not make without an ``example_input_array``: it says 0.
    """

    @staticmethod
    def summarize(
        summary_data: Any, total_parameters: int, trainable_parameters: int, model_size: float, *_: Any, **__: Any
    ) -> None:
        """Log the line."""
        trained, total = (
            get_human_readable_count(number).strip() for number in (trainable_parameters, total_parameters)
        )
        rank_zero_info(f"model: {trained} of {total} parameters are trained, {model_size:.3g} MB")


class _WithoutVersion(ProgressBar):
    """A bar that leaves out the version, of which Lightning shows the last four characters: of ``layer`` ``ayer``."""

    def get_metrics(self, *args: Any) -> dict[str, Any]:
        """The numbers of the bar."""
        known = super().get_metrics(*args)
        return {name: value for name, value in known.items() if name != "v_num"}


class _Rich(_WithoutVersion, RichProgressBar):
    pass


class _Tqdm(_WithoutVersion, TQDMProgressBar):
    pass


def shorten(trainer: Any) -> None:
    """Replace the summary and the bar that a trainer has by default."""
    for place, callback in enumerate(trainer.callbacks):
        if type(callback) in (ModelSummary, RichModelSummary):
            trainer.callbacks[place] = _SizeOfModel()
        elif type(callback) in (RichProgressBar, TQDMProgressBar):
            callback.__class__ = _Rich if isinstance(callback, RichProgressBar) else _Tqdm  # with its options
