"""Corpora, samplers and curation: functions from text or examples to what a step consumes."""

from effjax.data.curriculum import growing_range, stepped_range
from effjax.data.dsir import DSIR
from effjax.data.inclusion import inclusion_probabilities, systematic
from effjax.data.loss_table import ExactLoss, StaleLoss
from effjax.data.multiscale import MultiScale, PlannedStep, Shape, relative_cost
from effjax.data.nws import NWS, NWSketch
from effjax.data.prototypes import prototype_distances
from effjax.data.reweight import LossReweighting
from effjax.data.sampler import Position, Sampler, Spec, of_host
from effjax.data.scores import el2n, grand, kept_by_score
from effjax.data.selective_backprop import SelectiveBackprop
from effjax.data.seta import SeTa
from effjax.data.shuffle import shuffled
from effjax.data.step import Sampled, all_losses, sampled_step, selective_step
from effjax.data.subset import Subset
from effjax.data.uniform import Uniform

__all__ = [
    "DSIR",
    "NWS",
    "ExactLoss",
    "LossReweighting",
    "MultiScale",
    "NWSketch",
    "PlannedStep",
    "Position",
    "Sampled",
    "Sampler",
    "SeTa",
    "SelectiveBackprop",
    "Shape",
    "Spec",
    "StaleLoss",
    "Subset",
    "Uniform",
    "all_losses",
    "el2n",
    "grand",
    "growing_range",
    "inclusion_probabilities",
    "kept_by_score",
    "of_host",
    "prototype_distances",
    "relative_cost",
    "sampled_step",
    "selective_step",
    "shuffled",
    "stepped_range",
    "systematic",
]
