from .loop import TrainReport as TrainReport
from .loop import train as train
from .losses import DistillationLoss as DistillationLoss
from .losses import Loss as Loss
from .losses import TaskLoss as TaskLoss
from .settings import TrainSettings as TrainSettings
