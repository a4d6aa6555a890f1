"""One page a file; each is a function that `apps.ui.main` lists."""
