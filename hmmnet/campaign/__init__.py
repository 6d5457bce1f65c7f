"""Random campaigns: many seeds, each a machine in virtual time with its own mix of work and faults, checked to the last word.

`draw` decides what a seed does and writes it down as a `Program` (`program`): plain data, so that it can be repeated, shortened and
attached to a bug report. `trial` runs one program: actors (`crew`) load, store, launch, migrate, fork and change mappings on shared
`regions`, a nemesis harms devices and wires; then everything is healed and must be well again. Who looks on: `history` (each word is a
register of which every load must be explainable), `audit` (I1 to I8 of the books), `waits` (who waits for whom, when nothing moves).

`campaign` runs many seeds, `shrink` makes a failing one short, `sweep` goes through one scenario fault by fault instead.
"""
