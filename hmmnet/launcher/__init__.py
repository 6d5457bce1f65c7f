"""Starting a machine's processes, watching them, and leaving nothing behind: runtime directories, the zygote, the host process."""
