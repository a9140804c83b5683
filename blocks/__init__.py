"""The primitives: what each is as data, and what it costs; importing this registers every kind.

Each is computed by the file of the same name in ``modules``, which alone needs torch.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
