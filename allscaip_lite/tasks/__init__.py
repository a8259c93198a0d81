"""What one asks a model of a structure: energies, a relaxed geometry, vibrations."""
