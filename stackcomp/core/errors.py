"""Every error stackcomp raises on purpose.

One family, so that a caller can catch `StackcompError`; each message names the layer or setting, the value
met, and the way out. Errors that Python has a word for inherit from it too (`ValueError`, `TypeError`,
`RuntimeError`).
"""


class StackcompError(Exception):
    """Base of all errors raised on purpose."""


class SettingError(StackcompError, ValueError):
    """A setting is out of range: names the setting, the value and the range."""


class UnknownSetting(StackcompError, TypeError):
    """A setting that the pass does not have; the nearest ones are listed."""


class UnknownPass(StackcompError, ValueError):
    """A pass name that is not registered; the nearest ones are listed."""


class PipelineRefused(StackcompError, ValueError):
    """A pipeline that cannot run in this order: raised before any weight is read."""


class ContractBroken(StackcompError, RuntimeError):
    """What a pass did differs from what its contract predicted."""


class SelectionEmpty(StackcompError, ValueError):
    """An `only` or `skip` glob matches no layer; the nearest paths are listed."""


class NothingToCompress(StackcompError, ValueError):
    """The model holds no linear layer that a pass could compress."""


class UnsupportedModel(StackcompError, ValueError):
    """The model cannot be described: an unreadable folder or an unknown family."""


class BadWeights(StackcompError, ValueError):
    """A weight holds NaN or infinite values; the layer is named."""


class UnreachableRatio(StackcompError, ValueError):
    """No setting of the layers reaches the asked ratio; the largest reachable one is named."""


class DataError(StackcompError, ValueError):
    """The task's data are empty, unlabelled or lack a column."""


class MissingNeed(StackcompError, ValueError):
    """A pass needs a task, labels, a tokenizer or a teacher that the manager was not given."""


class OutputInUse(StackcompError, RuntimeError):
    """The output folder holds another result, or another process writes to it now."""


class CheckpointError(StackcompError, RuntimeError):
    """A checkpoint is cut short, altered, from a newer version, or not one of ours."""


class StudyRefused(StackcompError, ValueError):
    """A study is declared wrongly: two entries of one key, or an entry that starts from one outside the study."""


class ResultsDamaged(StackcompError, ValueError):
    """A file of results holds a line that is no row; the line is named."""


class PipelineFileError(StackcompError, ValueError):
    """A pipeline file raises, or does not define what is asked of it."""


class TrainingDiverged(StackcompError, RuntimeError):
    """The loss became NaN or infinite; the step is named."""


class StackcompWarning(UserWarning):
    """Base of the warnings stackcomp gives on purpose."""


class TooLittleCalibration(StackcompWarning):
    """Fewer calibration tokens than input features: the second moment is rank-deficient."""
