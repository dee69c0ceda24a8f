"""The Trainer of the command line."""

from typing import Any

from jsonargparse.typing import register_type
from lightning.pytorch import Trainer


class Batches:
    """A whole number of batches, or a share of all of them: 1 is one batch, 1.0 all.

    Lightning's annotation of it is a union of int and float. Python keeps one such union for all modules, in the order
    in which any of them first had it, and jsonargparse takes the first type that fits, so that an import elsewhere
    decides whether 1 is read as 1.0.
    """


def _is_number_of_batches(number: Any, _: type | None = None) -> bool:
    return type(number) in (int, float) and number >= 0 and (isinstance(number, int) or number <= 1)


def _read(word: str) -> int | float:
    try:
        number = int(word) if word.isdecimal() else float(word)
    except ValueError:
        number = None
    if number is None or not _is_number_of_batches(number):
        raise ValueError(f"expected a whole number of batches, or a share of all from 0.0 to 1.0, got {word}")
    return number


register_type(Batches, serializer=lambda number: number, deserializer=_read, type_check=_is_number_of_batches)


class CommandTrainer(Trainer):
    """The Trainer with a method for the command ``evaluate``, from which LightningCLI takes the command's options.

    Args:
        limit_train_batches: How many training batches an epoch has: a whole number, or a share of all (0.0 to 1.0).
        limit_val_batches: How many validation batches, likewise.
        limit_test_batches: How many test batches, likewise.
        limit_predict_batches: How many prediction batches, likewise.
        overfit_batches: How many training batches to fit and to validate on, always the same ones, likewise; null and 0
            turn it off.
    """

    evaluate = Trainer.predict

    def __init__(
        self,
        *args: Any,
        limit_train_batches: Batches | None = None,
        limit_val_batches: Batches | None = None,
        limit_test_batches: Batches | None = None,
        limit_predict_batches: Batches | None = None,
        overfit_batches: Batches | None = None,
        **kwargs: Any,
    ) -> None:
        limits: dict[str, Any] = {
            "limit_train_batches": limit_train_batches,
            "limit_val_batches": limit_val_batches,
            "limit_test_batches": limit_test_batches,
            "limit_predict_batches": limit_predict_batches,
            "overfit_batches": overfit_batches,
        }
        given = {name: limit for name, limit in limits.items() if limit is not None}
        for name in ("accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
            # By which Lightning divides in the first epoch.
            if kwargs.get(name) == 0:
                raise ValueError(f"expected trainer.{name} above 0, got {kwargs[name]}")
        super().__init__(*args, **given, **kwargs)
