"""The memory that a piece of work takes, shared by tests."""

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work) -> int:
    """Most bytes that torch's CPU allocator had given out at once beyond those at the start, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
