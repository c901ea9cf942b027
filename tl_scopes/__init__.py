"""Jacobian Scopes for TransformerLens: which input tokens move a prediction, and by how much.

The public names stand in `__init__.pyi`. Each is imported at its first use, since torch takes a second to import and
`tl-scopes --help` does not need it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
