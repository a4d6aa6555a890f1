"""Looking into a forward pass and changing it: sites, traces, patches, and the one function that runs them."""
