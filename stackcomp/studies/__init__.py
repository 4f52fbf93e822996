"""Studies: many pipelines on many models, run one after another into one file of rows.

Light to import: a study file must be readable without torch.
"""

from stackcomp.studies.combinations import combinations
from stackcomp.studies.rows import Rows
from stackcomp.studies.runner import Runner
from stackcomp.studies.search import Rung, Search
from stackcomp.studies.study import Entry, Study, declared

__all__ = ["Entry", "Rows", "Rung", "Runner", "Search", "Study", "combinations", "declared"]
