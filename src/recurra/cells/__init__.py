"""The recurrences of the house, a file per family, and the cells that go around them."""

from recurra.cells.gru import GRU, GRUResetBefore
from recurra.cells.highway import RecurrentHighway
from recurra.cells.lstm import LSTM, CoupledLSTM, LayerNormLSTM, LSTMState, PeepholeLSTM, ProjectedLSTM
from recurra.cells.minimal import MinGRU, MinLSTM
from recurra.cells.regularise import VariationalDropout, WeightDrop, Zoneout
from recurra.cells.vanilla import Vanilla
from recurra.cells.wrappers import LayerNorm, LearnedInitialState, Readout, Residual, Stack
from recurra.cells.xlstm import MLSTM, SLSTM, MLSTMState, SLSTMState

__all__ = [
    "Vanilla",
    "LSTM",
    "PeepholeLSTM",
    "ProjectedLSTM",
    "CoupledLSTM",
    "LayerNormLSTM",
    "LSTMState",
    "GRU",
    "GRUResetBefore",
    "RecurrentHighway",
    "MinGRU",
    "MinLSTM",
    "SLSTM",
    "SLSTMState",
    "MLSTM",
    "MLSTMState",
    "Stack",
    "Residual",
    "Readout",
    "LearnedInitialState",
    "LayerNorm",
    "VariationalDropout",
    "Zoneout",
    "WeightDrop",
]
