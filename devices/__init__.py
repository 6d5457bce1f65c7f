"""The device's side of hmmnet: processes that are GPUs (or the kernel's own test device).

A device keeps a mirrored page table and private memory, runs jobs on the same virtual addresses as the CPU, and faults like one. The
import name of this folder is `hmmnet.devices`; it uses the shared rooms of hmmnet and never the host.
"""
