"""A kernel of August 2017 for driver authors: the calls of HMM v25, as they were merged in Linux 4.14, over the same core as today's.

``include/linux/hmm.h`` and the new half of ``migrate.h``: what a driver includes. `host/README.md` has a driver that is worked out, and the
table of the patches. What is where:

- `pfn`      the bits of both kinds of words
- `hmm`      ``struct hmm``: the counter, mirrors, ranges; what the hardware must be able to do
- `order`    the order of an invalidation: the start counts, the end tells; for the one hub
- `walk`     what a snapshot says of an entry
- `mirror`   hmm_mirror_register, hmm_vma_get_pfns, hmm_vma_fault, hmm_vma_range_done
- `migrate`  migrate_vma with its two callbacks
- `devmem`   hmm_devmem_add and its kin, hmm_device; `Kernel`
- `driver`   what the drivers of our device processes do on such a kernel
"""

from .devmem import (
    HMM_DEVICE_MAX,
    Desc,
    HmmDevice,
    HmmDevmem,
    HmmDevmemOps,
    Kernel,
    Resource,
    VmFault,
)
from .hmm import HMM_UPDATE_INVALIDATE, Hardware, HmmMirror, HmmMirrorOps, HmmRange, HmmUpdate
from .migrate import MigrateVmaOps
from .mirror import (
    VmArea,
    find_vma,
    hmm_mirror_register,
    hmm_mirror_unregister,
    hmm_vma_fault,
    hmm_vma_get_pfns,
    hmm_vma_range_done,
)
from .pfn import (
    HMM_PFN_DEVICE_UNADDRESSABLE,
    HMM_PFN_EMPTY,
    HMM_PFN_ERROR,
    HMM_PFN_READ,
    HMM_PFN_SHIFT,
    HMM_PFN_SPECIAL,
    HMM_PFN_VALID,
    HMM_PFN_WRITE,
    MIGRATE_PFN_DEVICE,
    MIGRATE_PFN_ERROR,
    MIGRATE_PFN_LOCKED,
    MIGRATE_PFN_MIGRATE,
    MIGRATE_PFN_SHIFT,
    MIGRATE_PFN_VALID,
    MIGRATE_PFN_WRITE,
    hmm_pfn_to_frame,
    migrate_pfn,
    migrate_pfn_to_frame,
)

__all__ = [
    "HMM_DEVICE_MAX",
    "HMM_PFN_DEVICE_UNADDRESSABLE",
    "HMM_PFN_EMPTY",
    "HMM_PFN_ERROR",
    "HMM_PFN_READ",
    "HMM_PFN_SHIFT",
    "HMM_PFN_SPECIAL",
    "HMM_PFN_VALID",
    "HMM_PFN_WRITE",
    "HMM_UPDATE_INVALIDATE",
    "MIGRATE_PFN_DEVICE",
    "MIGRATE_PFN_ERROR",
    "MIGRATE_PFN_LOCKED",
    "MIGRATE_PFN_MIGRATE",
    "MIGRATE_PFN_SHIFT",
    "MIGRATE_PFN_VALID",
    "MIGRATE_PFN_WRITE",
    "Desc",
    "Hardware",
    "HmmDevice",
    "HmmDevmem",
    "HmmDevmemOps",
    "HmmMirror",
    "HmmMirrorOps",
    "HmmRange",
    "HmmUpdate",
    "Kernel",
    "MigrateVmaOps",
    "Resource",
    "VmArea",
    "VmFault",
    "find_vma",
    "hmm_mirror_register",
    "hmm_mirror_unregister",
    "hmm_pfn_to_frame",
    "hmm_vma_fault",
    "hmm_vma_get_pfns",
    "hmm_vma_range_done",
    "migrate_pfn",
    "migrate_pfn_to_frame",
]
