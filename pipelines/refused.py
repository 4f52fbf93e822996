"""A pipeline that is refused: rounding to integers before a factorization that needs floating-point values.

stackcomp check pipelines/refused.py      # says why, and prints a legal order
"""

import stackcomp as sc

pipeline = sc.Pipeline(
    sc.Int8Weights(only="encoder.layer.*"),
    sc.DenseSparse(ratio=2.8, only="encoder.layer.*"),
)
