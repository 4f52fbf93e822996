"""One training loop, into which losses plug."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loop": ["TrainReport", "train"],
        "losses": ["DistillationLoss", "Loss", "TaskLoss"],
        "settings": ["TrainSettings"],
    },
)
