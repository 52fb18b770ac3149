"""eigenfilter: optimizers as eigenvalue filters, for PyTorch.

An optimizer that converges has filtered the curvature of the point it converged to (Bolte, Le,
Pauwels, arXiv 2510.09034). Here are the optimizers, with fused updates (`SGD`, `MSAM`, `SAM`,
`USAM`, `TwoStepUSAM`, `HessianUSAM`, `AdamW`, and `SharpnessAware` around any other), schedules of
rho (`schedulers`), their kernels (`kernels`), the theory as functions (`filters`), Hessian spectra
to check it with (`curvature`), and a verdict on a trained model (`certify`).

Each part is imported when it is first used (PEP 562): `filters` needs NumPy alone.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eigenfilter import (
        certificate,
        controller,
        curvature,
        filters,
        kernels,
        monitor,
        optimizers,
        schedulers,
    )
    from eigenfilter.certificate import Certificate, certify
    from eigenfilter.controller import SharpnessController
    from eigenfilter.monitor import SharpnessMonitor
    from eigenfilter.optimizers import (
        MSAM,
        SAM,
        SGD,
        USAM,
        AdamW,
        HessianUSAM,
        SharpnessAware,
        TwoStepUSAM,
        ascent_sync,
        freeze_batch_norm,
        freeze_running_stats,
    )

    __version__: str

__all__ = [
    "MSAM",
    "SAM",
    "SGD",
    "USAM",
    "AdamW",
    "Certificate",
    "HessianUSAM",
    "SharpnessAware",
    "SharpnessController",
    "SharpnessMonitor",
    "TwoStepUSAM",
    "ascent_sync",
    "certificate",
    "certify",
    "controller",
    "curvature",
    "filters",
    "freeze_batch_norm",
    "freeze_running_stats",
    "kernels",
    "monitor",
    "optimizers",
    "schedulers",
]

# The module in which each name is defined; the others are modules themselves.
_MODULE_OF = {
    "Certificate": "certificate",
    "certify": "certificate",
    "SharpnessController": "controller",
    "SharpnessMonitor": "monitor",
    "MSAM": "optimizers",
    "SAM": "optimizers",
    "SGD": "optimizers",
    "USAM": "optimizers",
    "AdamW": "optimizers",
    "HessianUSAM": "optimizers",
    "SharpnessAware": "optimizers",
    "TwoStepUSAM": "optimizers",
    "ascent_sync": "optimizers",
    "freeze_batch_norm": "optimizers",
    "freeze_running_stats": "optimizers",
}


def __getattr__(name: str) -> object:
    """Import what `name` stands for, once."""
    if name in _MODULE_OF:
        value: object = getattr(importlib.import_module(f"eigenfilter.{_MODULE_OF[name]}"), name)
    elif name in __all__:
        value = importlib.import_module(f"eigenfilter.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("eigenfilter")
    else:
        raise AttributeError(f"module 'eigenfilter' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
