"""Transfer learning seen through neural collapse."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ncfinetune.backbone import Backbone as Backbone
    from ncfinetune.contrastive import SimCLR as SimCLR
    from ncfinetune.contrastive import SupCon as SupCon
    from ncfinetune.finetune import FineTuner as FineTuner
    from ncfinetune.learner import Learner as Learner
    from ncfinetune.supervised import Supervised as Supervised

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, so that the command line answers --help at once.
_HOME = {
    "Backbone": "backbone",
    "FineTuner": "finetune",
    "Learner": "learner",
    "SimCLR": "contrastive",
    "SupCon": "contrastive",
    "Supervised": "supervised",
}
__all__ = ["Backbone", "FineTuner", "Learner", "SimCLR", "SupCon", "Supervised"]

# In a checkout the folders callbacks and datamodules lie beside this one; an installation has them inside it.
_root = Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").exists():
    __path__.append(str(_root))


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"ncfinetune.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ncfinetune' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
