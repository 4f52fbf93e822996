"""What all tests share. Before anything of ours is imported: shapes in annotations of `ops` are checked while tests run."""

import gc

import pytest
from jaxtyping import install_import_hook

from tests import shapes

install_import_hook("stackcomp.ops", f"{shapes.__name__}.check")


@pytest.fixture(scope="session", autouse=True)
def frozen_imports():
    """Runs collect garbage to measure memory: what the libraries made when they were imported need not be looked at each time."""
    import transformers.trainer  # noqa: F401  # most of it

    gc.collect()
    gc.freeze()


@pytest.fixture
def tokenizer():
    """The toy tokenizer."""
    from tests import toys  # after the hook

    return toys.tokenizer()


@pytest.fixture
def model():
    """The model most tests use: a toy classifier."""
    from tests import toys

    return toys.bert_classifier()
