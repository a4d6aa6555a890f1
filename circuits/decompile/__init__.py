"""A discrete program as a text that a person reads and a machine runs."""
