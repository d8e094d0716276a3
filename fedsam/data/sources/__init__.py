"""Where data sets come from: a file a source."""
