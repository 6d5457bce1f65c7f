"""Linux's side of the machine: address spaces, page tables, the mmu_notifier hub, migrate_vma, page maps (see README.md here)."""
