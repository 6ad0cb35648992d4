"""``python -m recurra``, which torchrun can start as well."""

from recurra.cli import main

main()
