"""Corpora, samplers and curation: functions from text or examples to what a step consumes."""

from effjax.data.curriculum import growing_range, stepped_range
from effjax.data.inclusion import inclusion_probabilities, systematic
from effjax.data.loss_table import ExactLoss, StaleLoss
from effjax.data.multiscale import MultiScale, PlannedStep, Shape, relative_cost
from effjax.data.nws import NWS, NWSketch
from effjax.data.sampler import Position, Sampler, Spec, of_host
from effjax.data.shuffle import shuffled
from effjax.data.step import Sampled, all_losses, sampled_step
from effjax.data.uniform import Uniform

__all__ = [
    "NWS",
    "ExactLoss",
    "MultiScale",
    "NWSketch",
    "PlannedStep",
    "Position",
    "Sampled",
    "Sampler",
    "Shape",
    "Spec",
    "StaleLoss",
    "Uniform",
    "all_losses",
    "growing_range",
    "inclusion_probabilities",
    "of_host",
    "relative_cost",
    "sampled_step",
    "shuffled",
    "stepped_range",
    "systematic",
]
