"""The client's side: local training under a cap, and evaluation."""

from dfed.client.evaluation import Evaluation, Evaluator, Trial, combine, evaluate_batch, sample_of
from dfed.client.forms import DEFAULT_CODEC, Form, Forms, nothing
from dfed.client.report import FEATURES_LOST, ClientReport
from dfed.client.settings import ClientSettings, ScheduleSettings, TrainingSettings, client_conflicts, make_optimizer
from dfed.client.skeleton import Skeleton
from dfed.client.training import LocalResult, run_plan
from dfed.client.worker import Worker

__all__ = [
    "DEFAULT_CODEC",
    "FEATURES_LOST",
    "ClientReport",
    "ClientSettings",
    "Evaluation",
    "Evaluator",
    "Form",
    "Forms",
    "LocalResult",
    "ScheduleSettings",
    "Skeleton",
    "TrainingSettings",
    "Trial",
    "Worker",
    "client_conflicts",
    "combine",
    "evaluate_batch",
    "make_optimizer",
    "nothing",
    "run_plan",
    "sample_of",
]
