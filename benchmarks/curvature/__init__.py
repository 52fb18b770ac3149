"""Ten eigenpairs of the Hessians of trained networks: the library beside its peers."""
