"""Facts and contracts: plain Python that never imports torch."""

__version__ = "0.3.0"
