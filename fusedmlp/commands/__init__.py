"""The commands of `fusedmlp` that train nothing: info, verify, tune."""
