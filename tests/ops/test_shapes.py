"""The shape checks are really on: a wrong shape is refused by its annotation."""

import pytest
import torch

from stackcomp import ops


def test_a_wrong_shape_is_refused():
    with pytest.raises(Exception, match="masks"):
        ops.largest_in_groups(torch.zeros(4), 1, 2)
