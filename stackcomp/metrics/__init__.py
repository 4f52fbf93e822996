"""What a model is worth (quality) and what it takes (cost): measured, never claimed."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cost": ["Latency", "PeakMemory", "bytes_of_file", "latency", "latency_inputs", "macs", "parameters"],
        "quality": ["Difference", "Score", "embed", "evaluate", "paired_difference"],
    },
)
