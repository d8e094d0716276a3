"""A data set packed into a folder of a few files, from which runs read what they need."""
