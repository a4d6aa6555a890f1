"""The models: one transformer, plain to read, and the ways in and out of other libraries' formats."""
