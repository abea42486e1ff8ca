"""From what a network predicts to a score, its divergence, and the denoiser of integers.

May import: core, sdes.
"""

from sbml.score.prediction import FOREIGN as FOREIGN
from sbml.score.prediction import KIND as KIND
from sbml.score.prediction import KINDS as KINDS
from sbml.score.prediction import LABELS as LABELS
from sbml.score.prediction import LEVELS as LEVELS
from sbml.score.prediction import PARAMETERIZATIONS as PARAMETERIZATIONS
from sbml.score.prediction import PREDICTIONS as PREDICTIONS
from sbml.score.prediction import Adapter as Adapter
from sbml.score.prediction import Condition as Condition
from sbml.score.prediction import Foreign as Foreign
from sbml.score.prediction import LogSnrRange as LogSnrRange
from sbml.score.prediction import Network as Network
from sbml.score.prediction import NetworkScore as NetworkScore
from sbml.score.prediction import OfData as OfData
from sbml.score.prediction import Prediction as Prediction
from sbml.score.prediction import from_prediction as from_prediction
