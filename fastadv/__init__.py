"""fastadv: compiled kernels, attacks and a small trainer for adversarial robustness in PyTorch."""

import sys

__version__ = "0.1.0"

try:
    from . import attacks, losses, methods, ops
    from .engine.frozen import freeze
    from .errors import UsageError
except (ValueError, RuntimeError) as error:
    # `python -m fastadv.NAME`, whose argv[0] is "-m" until NAME is found, reports as NAME would.
    if sys.argv[:1] == ["-m"] and str(error).startswith("FASTADV_"):
        sys.exit(f"error: {error}")
    raise

__all__ = ["UsageError", "attacks", "freeze", "losses", "methods", "ops"]
