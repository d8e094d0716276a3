"""Which training images are whose: a file a way to say it."""
