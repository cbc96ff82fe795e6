"""What trains: the loop, the methods with their losses and samplers, and the cached targets that they learn from."""
