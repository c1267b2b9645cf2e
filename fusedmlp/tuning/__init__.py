"""Measures on this machine which way of running a network is the fastest, ahead of use."""
