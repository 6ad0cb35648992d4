"""How the house's cells begin: a stated choice, the same for all of them."""

from __future__ import annotations

from torch import nn


def initialise(cell: nn.Module, hidden_size: int, heads: int = 1) -> None:
    """Set a cell's own parameters, by name, to values that train well.

    - ``weight_hh``: each gate's block of ``hidden_size // heads`` rows orthogonal (Saxe et al. 2014), so that at first
      neither signal nor gradient grows or dies on its way through time.
    - other matrices: each gate's block uniform by its fan-in and fan-out (Glorot & Bengio 2010).
    - ``scale``s of a normalisation: one. Biases and other vectors, such as peepholes: zero; a cell with a forget
      gate opens it afterwards (Jozefowicz et al. 2015).

    PyTorch's own choice, uniform in 1/sqrt(H), is what ``recurra.nn`` uses.
    """
    for name, parameter in cell.named_parameters(recurse=False):
        if parameter.dim() < 2:
            nn.init.constant_(parameter, 1.0 if name.startswith("scale") else 0.0)
            continue
        recurrent = name.startswith("weight_hh")
        for block in parameter.detach().flatten(0, -2).split(hidden_size // heads if recurrent else hidden_size):
            if recurrent:
                nn.init.orthogonal_(block)
            else:
                nn.init.xavier_uniform_(block)
