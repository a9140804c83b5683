"""The kinds of blocks, routers, residuals and encodings: their fields and what they cost.

Importing this package registers every kind. The file of the same name in ``modules`` computes each;
only those files need torch.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if not _module.ispkg:
        importlib.import_module(f"{__name__}.{_module.name}")
