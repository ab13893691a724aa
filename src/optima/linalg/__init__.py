"""Linear algebra that every method shares: the hessian, its factor, products, scalings."""
