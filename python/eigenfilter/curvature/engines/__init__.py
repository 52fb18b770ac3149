"""Ways to multiply by a curvature matrix. Importing a module registers its engines."""

import importlib
import pkgutil

from eigenfilter.curvature.engines import double_backward, forward_mode, sharded  # noqa: F401
from eigenfilter.curvature.engines.registry import ENGINE_SPECS, Engine, Engines

__all__ = ["NAMES", "Engine", "Engines"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

NAMES = tuple(ENGINE_SPECS)
