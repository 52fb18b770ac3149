"""Other packages that compute eigenvalues of a Hessian; each module has its SOLVERS."""
