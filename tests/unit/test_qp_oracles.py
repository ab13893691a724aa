"""The QP engine against solvers that are not ours."""
