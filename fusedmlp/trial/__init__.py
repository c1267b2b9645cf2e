"""The process that `fusedmlp tune` starts: checks candidates for a network, and times them."""
