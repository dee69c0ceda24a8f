"""What the command line does not say: adverts of other products, and warnings that its user can do nothing about.

Only the command line is quiet: a project that imports the package keeps every message of its libraries.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Lightning's loggers, whose messages begin with these words for reasons that are no matter of the run. Where another
# library imports pytorch_lightning, lightning's messages go to the loggers of that.
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.fabric.utilities.seed",
    "lightning_fabric.utilities.seed",
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
)
# What is restored has a message of its own when it is.
_NOISE = (
    *("💡 Tip:", "GPU available: False", "TPU available: False", "Seed set to"),
    *("`Trainer.fit` stopped: `max_", "Detected KeyboardInterrupt"),
    *("`weights_only` was not set", "Restoring states from the checkpoint path"),
)
# Warnings of a library about its own code or another library's, by the beginning of their text.
_OF_LIBRARIES = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # The default device of StochasticWeightAveraging, which the command line saves as text.
    r"\s*Unable to serialize instance cpu",
)


@contextmanager
def quiet() -> Iterator[None]:
    """A context without these messages."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    with warnings.catch_warnings():
        for text in _OF_LIBRARIES:
            warnings.filterwarnings("ignore", text)
        for logger in loggers:
            logger.addFilter(_is_news)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not re.sub(r"^\[rank: \d+\] ", "", record.getMessage()).startswith(_NOISE)
