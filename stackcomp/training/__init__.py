"""One training loop, into which losses plug.

What it offers is listed in the stub beside this file, and imported when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
