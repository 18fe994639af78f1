"""Starting many runs: `plan` says which, `local` runs them on this machine."""
