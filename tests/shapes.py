"""The checker that the test run puts on every function of `stackcomp.ops`: types and tensor shapes as annotated."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
