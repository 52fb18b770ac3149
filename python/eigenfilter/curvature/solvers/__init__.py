"""Eigenvalues, densities and traces of any symmetric operator, from products alone."""
