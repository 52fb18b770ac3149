"""Ways to multiply by a curvature matrix. Importing a module registers its engines."""

from eigenfilter.curvature.engines import double_backward, forward_mode, sharded  # noqa: F401
from eigenfilter.curvature.engines.registry import ENGINE_SPECS, Engine, Engines

__all__ = ["NAMES", "Engine", "Engines"]

NAMES = tuple(ENGINE_SPECS)
