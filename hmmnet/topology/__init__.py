"""A machine as data: memories, devices, switches and the links between them.

`model` is what everything else holds; `load` reads it from TOML or a preset's name; `routes` answers which links a transfer crosses;
`schema` describes the file format to editors; `draw` shows a machine to a person.
"""

from .model import DeviceSpec, LinkSpec, MemoryNode, Switch, Topology

__all__ = ["DeviceSpec", "LinkSpec", "MemoryNode", "Switch", "Topology"]
