"""What happened, and why: events with causes, counters, and the tables and pictures that show them.

`counters` and `events` are light enough for a device process; `profiler_table` and `residency` draw with rich and load it only when asked.
"""
