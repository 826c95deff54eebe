"""Rematerialization: the order of operations and what to compute again, under a budget of bytes.

`solve` takes a `Problem` and a budget and returns a `Solution`. See solve.py; the problem is in problem.py,
the local search in search.py and the compiled parts below it, the proof of a bound in certificate.py, the
check that shares nothing with them in checker.py.
"""

from .memory import given_order, peak, resident
from .problem import Problem, Schedule
from .solve import Solution, solve

__all__ = ["Problem", "Schedule", "Solution", "given_order", "peak", "resident", "solve"]
