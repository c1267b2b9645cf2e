"""Tests of what fusedmlp tune measures, keeps and chooses by."""
