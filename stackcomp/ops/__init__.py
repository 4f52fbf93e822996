"""Tensor mathematics: factorizations, supports, rounding, masks. Nothing here knows a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["masks", "quantize", "supports"],
    submod_attrs={
        "allocate": ["Candidate", "allocate", "dense_sparse_bytes", "shapes_of_size"],
        "factorize": ["DenseSparseFactors", "dense_sparse"],
        "low_rank": ["low_rank", "rank_errors"],
        "masks": ["largest", "largest_in_groups"],
        "quantize": ["int8_linear", "int8_weight_linear", "quantize_rows"],
        "whiten": ["Whitener", "metric_error", "whitener"],
        "supports": ["pack_fixed", "pack_free", "unpack_fixed", "unpack_free"],
    },
)
