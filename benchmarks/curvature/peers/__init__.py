"""Who else finds eigenvalues of a Hessian. Each module has its SOLVERS."""
