"""The word tokenizer that the tests of data use."""

from tests.data.conftest import tokenizer

__all__ = ["tokenizer"]
