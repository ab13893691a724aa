"""Properties of the QP engine that hold for every problem."""
