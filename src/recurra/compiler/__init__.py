"""From one step of a cell to a fast sequence: trace it, find its carries, schedule what need not be in the loop."""

from recurra.compiler.door import Traced

__all__ = ["Traced"]
