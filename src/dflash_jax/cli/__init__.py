"""The program `dflash-jax`: parse, call one function of a room, write its result. No logic and no maths live here.

It promises, for every command: a table for people, then one JSON document as the last line of stdout (and in
`--json FILE`); exit 0 when all is well, 1 when a check found a violation, 2 for bad input with one line on stderr and
no traceback, 130 when interrupted. It may import every room, and imports a room only when its command is called, so
that help is quick.
"""

from dflash_jax.cli.program import main

__all__ = ["main"]
