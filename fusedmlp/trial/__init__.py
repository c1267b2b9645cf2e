"""What the process does that `fusedmlp tune` starts: checks the candidates for a network, and times them."""
