"""Compressed layers, and surgery on the weights of a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["layers", "matrix", "quantizer", "surgery", "tree"],
    submod_attrs={
        "layers": ["CompressedEmbedding", "CompressedLayer", "CompressedLinear"],
        "matrix": ["StoredMatrix"],
        "surgery": ["factorize", "quantize", "sparsify"],
        "tree": ["WeightHandle", "absolute", "check_finite", "relative", "weights", "weights_digest"],
    },
)
