"""Programs that come with hmmnet: each builds data in emulated CPU memory, runs a kernel on the same addresses, and checks what came out.

A workload is ``async def name(machine, **arguments) -> report`` in the entry point group ``hmmnet.workloads``; users add their own the same
way. The report is a dictionary fit for JSON whose ``correct`` says whether the result was what plain Python or numpy computes from the same
data; ``mistakes`` says where it was not. All built-in workloads take ``devices`` (names; default: every device of the machine, the work is
split between them), ``placement`` (``demand`` or ``remote``) and ``seed``.
"""
