"""moesaic turns a dense language model into a Mixture-of-Experts, without training."""

__version__ = "0.1.0"

from .models.working import register as _register

_register()
