"""The settings of a language model. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field

from recurra.training.config import TrainingConfig, setting

CELLS = (
    "lstm",
    "gru",
    "vanilla",
    "relu",
    "peephole-lstm",
    "coupled-lstm",
    "layer-norm-lstm",
    "gru-reset-before",
    "highway",
    "min-gru",
    "min-lstm",
    "slstm",
    "mlstm",
)


@dataclass(frozen=True)
class TextConfig:
    """What the text is made of, and which part of it is held out."""

    unit: str = setting(
        "character", "What the model reads and writes.", choices=("character", "byte", "word", "subword")
    )
    vocabulary_size: int | None = setting(
        None, "Most words or subwords to know; none for 10,000 words or 2,000 subwords.", low=2
    )
    validation: float = setting(0.05, "Share of the text held out to choose the best checkpoint.", above=0, below=0.5)
    test: float = setting(0.05, "Share at the end held out for 'recurra evaluate'.", above=0, below=0.5)


@dataclass(frozen=True)
class ModelConfig:
    """The network: an embedding, recurrent layers, a readout."""

    cell: str = setting("lstm", "The recurrence.", choices=CELLS)
    layers: int = setting(1, "Recurrent layers on top of one another.", low=1, high=100)
    hidden_size: int = setting(256, "Units of each layer.", low=1, high=2**16)
    embedding_size: int = setting(64, "Features of the vector that stands for a character or word.", low=1, high=2**16)
    tied: bool = setting(False, "Use the embedding as the readout, too; the last layer then has its size.")
    residual: bool = setting(False, "Add each layer's input to its output, from the second on.")
    layer_norm: bool = setting(False, "Normalise the input of each layer.")
    dropout: float = setting(0.0, "Share of features dropped around each layer, one mask a window.", low=0, below=1)
    zoneout: float = setting(0.0, "Share of the state that keeps its old value at each step.", low=0, below=1)
    weight_drop: float = setting(0.0, "Share of the recurrent weights dropped in each window.", low=0, below=1)


@dataclass(frozen=True)
class LanguageConfig:
    """All settings of ``recurra train language``."""

    text: TextConfig = field(default_factory=TextConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
