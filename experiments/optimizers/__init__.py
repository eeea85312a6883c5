"""The optimizers that are compared: their settings, defaults by problem, and how each is built.

Every optimizer takes the standard closure, so one training loop serves all. A new one is one dataclass and one line in
`OPTIMIZERS`. Packages are imported when an optimizer is built, so that nobody needs those that he does not compare.
"""

from experiments.optimizers.adam import AdamSettings, AdamWSettings
from experiments.optimizers.base import CommonSettings, Settings
from experiments.optimizers.buildable import check_buildable
from experiments.optimizers.choose import (
    OPTIMIZERS,
    check_names,
    choose_settings,
    default_optimizers,
    settings_class,
)
from experiments.optimizers.dense import DenseFisherSettings
from experiments.optimizers.first_order import FirstOrderSettings
from experiments.optimizers.full_batch import FullBatchSettings
from experiments.optimizers.gram import GramSettings
from experiments.optimizers.hessian_free import HessianFreeSettings, RecipeSettings
from experiments.optimizers.kfac import KFACSettings
from experiments.optimizers.lbfgs import LBFGSSettings
from experiments.optimizers.muon import MuonSettings
from experiments.optimizers.sgd import SGDSettings
from experiments.optimizers.shampoo import ShampooSettings
from experiments.optimizers.soap import SOAPSettings

__all__ = [
    "OPTIMIZERS",
    "AdamSettings",
    "AdamWSettings",
    "CommonSettings",
    "DenseFisherSettings",
    "FirstOrderSettings",
    "FullBatchSettings",
    "GramSettings",
    "HessianFreeSettings",
    "KFACSettings",
    "LBFGSSettings",
    "MuonSettings",
    "RecipeSettings",
    "SGDSettings",
    "SOAPSettings",
    "Settings",
    "ShampooSettings",
    "check_buildable",
    "check_names",
    "choose_settings",
    "default_optimizers",
    "settings_class",
]
