"""What a run leaves on the disk: every file name, format and metrics key."""
