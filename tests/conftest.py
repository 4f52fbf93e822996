"""What all tests share. Before anything of ours is imported: shapes in annotations of `ops` are checked while tests run."""

import pytest
from jaxtyping import install_import_hook

from tests import shapes

install_import_hook("stackcomp.ops", f"{shapes.__name__}.check")


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
