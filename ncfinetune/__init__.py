"""Transfer learning seen through neural collapse."""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
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

# The module of each public name. Modules are imported on first use, so that the command line answers --help at once.
_HOME = {
    "Backbone": "backbone",
    "FineTuner": "finetune",
    "Learner": "learner",
    "SimCLR": "contrastive",
    "SupCon": "contrastive",
    "Supervised": "supervised",
}
__all__ = ["Backbone", "FineTuner", "Learner", "SimCLR", "SupCon", "Supervised"]


class _OuterFolders(MetaPathFinder):
    """Finds the folders ``callbacks`` and ``datamodules`` of a checkout, which lie beside this one, and nothing else.

    The root in ``__path__`` would find them too, but ``ncfinetune.ncfinetune`` and ``ncfinetune.tests`` as well: second
    copies of modules, whose classes differ from those of the first copies.
    """

    root = Path(__file__).resolve().parent.parent

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        outer = fullname in ("ncfinetune.callbacks", "ncfinetune.datamodules")
        return PathFinder.find_spec(fullname, [str(self.root)]) if outer else None


# An installation has the two folders inside this one. The finder is inserted first, since otherwise the finder of an
# editable installation of another checkout would be asked before it.
if (_OuterFolders.root / "setup.cfg").exists():
    sys.meta_path.insert(0, _OuterFolders())


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"ncfinetune.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ncfinetune' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
