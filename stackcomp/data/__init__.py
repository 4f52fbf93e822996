"""Tasks, batches and calibration text. Loads its modules when a name of theirs is first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["tasks"],
    submod_attrs={
        "batches": ["Collator", "LengthBatches", "inference_batches"],
        "calibration": ["Calibration", "CrossMoment", "SecondMoment"],
        "sensitivity": ["gradient_moments"],
        "sources": ["Files", "Hub", "Package", "Rows", "Source"],
    },
)
