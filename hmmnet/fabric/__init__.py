"""The interconnect: emulated time, links that are shared fairly, and DMA streams paced to them."""
