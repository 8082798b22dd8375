"""Benchmarks of what takes the time, on random weights and random tokens: ``mohawk-nas bench``.

One module a suite, each with ``cases(setup)``. Nothing in here is imported by the rest of the
package but the command line; only how calls are timed is shared (``timing.py``).
"""
