"""Where a run may be followed live, one service a file; each needs the extra of its name."""
