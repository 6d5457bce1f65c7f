"""Recorded kernel scripts played on the emulator, compared line by line: the oracle is a real kernel.

`script` reads trace files, `grammar` parses the lines, `operations` does them (one registered function each), `player` plays a script on a
process, `compare` and `report` say what came out. `world` provides the machine.
"""
