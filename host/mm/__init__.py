"""The modelled address space: VMAs, page table, frames, reverse map, CPU faults, and what HMM needs of them (see `space.py`)."""
